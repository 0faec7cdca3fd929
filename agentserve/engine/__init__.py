"""The engine: a runner on a device, a process around it, and the in-process `LLM`."""
