"""The ways to isolate a sandbox. `base` is what a backend must do; each other module is one backend or a part of one."""
