"""The page, and the JSON that it asks for once a second."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from urllib.parse import unquote

from django.db.models import Count
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import ensure_csrf_cookie
from django.views.decorators.http import require_GET, require_POST

from example_project.shop import jobs, locks
from example_project.shop.celery import app
from example_project.shop.models import JobRun, Tick

SHOWN = 40
"""Rows of jobs on the page."""


@require_GET
@ensure_csrf_cookie
def page(request: HttpRequest) -> HttpResponse:
    """Everything, as it is now; the page's script draws it, and keeps it so."""
    return render(request, "shop/page.html", {"jobs": jobs.JOBS, "times": jobs.TIMES, "live": _live()})


@require_GET
@never_cache
def live(_request: HttpRequest) -> JsonResponse:
    return JsonResponse(_live())


@require_POST
def press(request: HttpRequest) -> HttpResponse:
    """Send the same job ten times. To the script ``{"press": …}``, to a form the page again."""
    name = request.POST.get("job", "")
    if name not in jobs.JOBS:
        return HttpResponseBadRequest(f"no job {name!r}: write job={'|'.join(jobs.JOBS)}")
    made = jobs.press(name)
    if "application/json" in request.headers.get("Accept", ""):
        return JsonResponse({"press": made})
    return redirect("page")


@require_GET
@never_cache
def pressed(_request: HttpRequest, pressed: str) -> JsonResponse:
    """What became of the messages of one press, all of it: for a check from outside."""
    ids = JobRun.objects.filter(press=pressed).values("task_id")
    return JsonResponse({"jobs": [_job(run) for run in JobRun.objects.filter(task_id__in=ids).order_by("pk")]})


@require_GET
@never_cache
def ticks(_request: HttpRequest) -> JsonResponse:
    """How many messages came for each due time of each entry: one, unless two beats have sent it."""
    counted = Tick.objects.order_by("due").values("entry", "due").annotate(messages=Count("task_id"))
    return JsonResponse({"ticks": [{**each, "due": _time(each["due"])} for each in counted]})


@require_GET
def healthy(_request: HttpRequest) -> HttpResponse:
    """For a health check: the page is served, and the database answers. etcd and Redis have checks of their own."""
    JobRun.objects.exists()
    return HttpResponse("yes\n", content_type="text/plain")


def _live() -> dict[str, Any]:
    seen = locks.seen(app)
    for lock in seen["locks"]:
        in_line = [each["task_id"] for each in lock["waiting"]]
        waiting = JobRun.objects.filter(lock=lock["name"], state=JobRun.State.WAITING)
        lock["put_back"] = waiting.exclude(task_id__in=in_line).count()
    counts: dict[str, int] = dict(JobRun.objects.order_by().values_list("state").annotate(Count("pk")))
    return {
        **seen,
        "jobs": [_job(run) for run in JobRun.objects.all()[:SHOWN]],
        "counts": {state: counts.get(state, 0) for state in JobRun.State.values},
        "ticks": [
            {"entry": tick.entry, "due": _time(tick.due), "received": _time(tick.received), "task_id": tick.task_id}
            for tick in Tick.objects.all()[:6]
        ],
    }


def _job(run: JobRun) -> dict[str, Any]:
    return {
        "task_id": run.task_id,
        "task": run.task,
        "key": unquote(run.lock.rpartition("/")[2]),
        "press": run.press,
        "state": run.state,
        "worker": run.worker,
        "pid": run.pid,
        "token": run.token,
        "waits": run.waits,
        "because": run.because,
        "sent": _time(run.sent),
        "started": _time(run.started),
        "ended": _time(run.ended),
    }


def _time(when: datetime | None) -> str | None:
    return when.isoformat() if when else None
