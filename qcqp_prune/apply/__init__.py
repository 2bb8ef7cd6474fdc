"""From masks to a smaller network, and the proof that it is the right one."""
