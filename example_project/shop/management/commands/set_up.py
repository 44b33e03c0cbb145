from __future__ import annotations

from typing import Any

from django.core.management import call_command
from django.core.management.base import BaseCommand

from example_project.shop import schedule
from example_project.shop.models import Account, Product, Stock

ACCOUNTS = ("Adams", "Brook", "Castro", "Dietz")
PRODUCTS = {"A-100": ("Atlas", 2900), "B-200": ("Board game", 3450), "C-300": ("Cherry tree", 1999)}


class Command(BaseCommand):
    help = "Makes the tables, and in them some accounts and products and beat's schedule. What is there stays."

    def handle(self, *_args: Any, **_options: Any) -> None:
        call_command("migrate", verbosity=0)
        for name in ACCOUNTS:
            Account.objects.get_or_create(name=name)
        for sku, (name, cents) in PRODUCTS.items():
            product, _ = Product.objects.get_or_create(sku=sku, defaults={"name": name, "cents": cents})
            Stock.objects.get_or_create(product=product)
        made = schedule.make()
        self.stdout.write(f"the database is set up; {made} entries added to beat's schedule")
