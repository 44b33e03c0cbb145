from __future__ import annotations

import socket
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from example_project.shop import locks
from example_project.shop.celery import app


class Command(BaseCommand):
    help = "Says whether the beat of this host leads or stands by, for a health check: status 1 if it does neither."

    def handle(self, *_args: Any, **_options: Any) -> None:
        seen, host = locks.seen(app), socket.gethostname()
        mine = [beat for beat in seen["beats"] if beat["host"] == host]
        if not mine:
            raise CommandError(seen["etcd"] or f"no beat on {host} leads or stands by")
        self.stdout.write("leads" if mine[0]["holds"] else "stands by")
