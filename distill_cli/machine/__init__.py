"""What this machine has: GPUs, memory, processes, the installed torch. No torch is imported here."""
