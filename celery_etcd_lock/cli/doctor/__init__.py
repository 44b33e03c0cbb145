"""``doctor``: whether etcd is there, and fit for locks.

Each of `members`, `probes` and `growth` looks at one side of it and gives `findings`; `faults` knows which versions
have which, and `understood` says what the settings mean.
"""

from celery_etcd_lock.cli.doctor.command import doctor

__all__ = ["doctor"]
