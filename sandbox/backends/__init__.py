"""The ways to isolate a sandbox. `base` is what a backend must do; every other module is one or a part of one."""
