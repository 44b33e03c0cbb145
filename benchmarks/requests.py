"""What is asked of etcd, as etcd itself counts it."""

from __future__ import annotations

from benchmarks import plots
from benchmarks.findings import Section, table
from benchmarks.stage import Stage
from celery_etcd_lock.locks import Mutex
from tests.costs import Bill, Clock, Crowd, Wire, bill_of_a_ttl, keep_for, open_session, requests, take

__all__ = ["counted"]

WIRES: tuple[Wire, ...] = ("grpc", "gateway")


def counted(stage: Stage) -> Section:
    """Requests for a lock, for a hand-over, and to keep a session."""
    section = Section("requests", "Requests to etcd, counted by etcd")
    etcd, rows = stage.quick_etcd, []
    curves: dict[str, list[tuple[float, float]]] = {wire: [] for wire in WIRES}
    for wire in WIRES:
        times = 20
        with open_session(etcd, wire) as session:
            take(Mutex(session, "/counted"))
            bill = Bill(etcd)
            for _ in range(times):
                take(Mutex(session, "/counted"))
            each = requests(bill.so_far()) / times
            bill = Bill(etcd)
            for _ in range(times):
                Mutex(session, "/counted").acquire(blocking=False).release()
            tried = requests(bill.so_far()) / times
        section.add(
            f"requests of a lock and unlock, {wire}", max(each, tried), f"{each:g}; as a task does it: {tried:g}", bar=2
        )
        handed = []
        for waiters in stage.sizes.waiters:
            processes = 4 if waiters % 4 == 0 else 2
            name = f"/crowd/{wire}/{waiters}"
            with Crowd(etcd, wire, name, waiters=waiters, processes=processes) as crowd:
                bill_of_all, took = crowd.hand_over()
            over = waiters + 1
            curves[wire].append((waiters, took / over * 1e3))
            handed.append(requests(bill_of_all) / over)
            rows.append((wire, waiters, f"{handed[-1]:.2f}", f"{took / over * 1e3:.2f} ms"))
        most = max(handed)
        section.add(
            f"requests of a hand-over with {', '.join(map(str, stage.sizes.waiters))} waiters, {wire}", most,
            ", ".join(f"{each:.2f}" for each in handed), bar=3.0,
            note="constant: no more with 500 than with 2. A watch made and ended counts as one each",
        )  # fmt: skip
        for count, bar in ((0, 3), (1, 4)):
            clock = Clock()
            with open_session(etcd, wire, clock=clock, background=False) as session:
                held = keep_for(session, f"/kept/{wire}/", count) if count else []
                asked = requests(bill_of_a_ttl(etcd, session, clock))
                assert all(lock.is_held() for lock in held)
            what = "holding" if count else "idle"
            section.add(f"requests of a process in a TTL, {what}, {wire}", asked, bar=bar)
        section.raw[wire] = {"per_hand_over": dict(zip(stage.sizes.waiters, handed, strict=True))}
    section.plots["waiters"] = plots.lines("A hand-over, with so many who wait", "waiters", "ms", curves)
    section.tables.append(table(["", "waiters", "requests of a hand-over", "time of one"], rows))
    return section
