"""The solvers that ship with qcqp-prune, one to a file, found through the entry points `qcqp_prune.solvers`."""
