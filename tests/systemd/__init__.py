"""The installed service under a real systemd; run by hand: `python -m tests.systemd`."""
