from __future__ import annotations

from django.urls import path

from example_project.shop import views

urlpatterns = [
    path("", views.page, name="page"),
    path("live.json", views.live, name="live"),
    path("press", views.press, name="press"),
    path("press/<str:pressed>.json", views.pressed, name="pressed"),
    path("ticks.json", views.ticks, name="ticks"),
    path("healthy", views.healthy, name="healthy"),
]
