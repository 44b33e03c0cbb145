"""The promises, shown on this machine: ``python -m example_project.demo``, or ``make demo``."""
