"""Policies on conflict: what they refuse, what they are as JSON, what they decide."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.json import dumps, loads

from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.tasks.conflict import Action, Conflict, PutBack, Refuse, Retry, SkipRun, WaitInPlace, nearest

POLICIES = [
    Conflict.retry(),
    Conflict.retry(5),
    Conflict.retry(backoff=2, backoff_max=60, jitter=False, max_wait=None, then="skip"),
    Conflict.retry(backoff=30),
    Conflict.skip(),
    Conflict.skip(result={"rows": [1, None, "x"]}, chain="continue"),
    Conflict.wait(),
    Conflict.wait(timeout=0.5, then="skip"),
    Conflict.fail(),
    Conflict.coalesce(),
]


def decide(policy: Conflict, *, random: float = 0.5, **case: Any) -> Action:
    return policy.decide(random=lambda: random, **case)


class TestMade:
    @pytest.mark.parametrize("policy", POLICIES, ids=repr)
    def test_survives_json_and_pickle(self, policy: Conflict) -> None:
        """A policy travels in a message's header, by any serializer, and comes out equal."""
        assert Conflict.from_json(json.loads(json.dumps(policy.to_json()))) == policy
        assert Conflict.parse(loads(dumps(policy.to_json()))) == policy
        assert pickle.loads(pickle.dumps(policy)) == policy

    @pytest.mark.parametrize("policy", POLICIES, ids=repr)
    def test_is_a_frozen_hashable_value(self, policy: Conflict) -> None:
        """Equal policies are one member of a set, different ones are several, and none can be changed."""
        assert {policy, Conflict.from_json(policy.to_json())} == {policy}
        assert len({*POLICIES}) == len(POLICIES)
        with pytest.raises(AttributeError):
            policy.then = "skip"  # type: ignore[attr-defined]

    @pytest.mark.parametrize("policy", POLICIES, ids=repr)
    def test_is_shown_as_it_is_written(self, policy: Conflict) -> None:
        """The repr is the code that makes the policy."""
        assert eval(repr(policy), {"Conflict": Conflict}) == policy

    def test_json_is_short(self) -> None:
        """Only what differs from the defaults is sent."""
        assert Conflict.retry(max_wait=60).to_json() == {"name": "retry", "max_wait": 60}
        assert Conflict.fail().to_json() == {"name": "fail"}

    @pytest.mark.parametrize("name", ["retry", "skip", "wait", "fail", "coalesce"])
    def test_is_parsed_from_its_name(self, name: str) -> None:
        """A name is the policy with its defaults; a policy is itself."""
        policy = getattr(Conflict, name)()
        assert Conflict.parse(name) == policy
        assert Conflict.parse(policy) is policy

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ("retyr", "did you mean 'retry'?"),
            ("Skip", "did you mean 'skip'?"),
            ("ignore", "did you mean 'skip'?"),
            ("raise", "did you mean 'fail'?"),
            ("block", "did you mean 'wait'?"),
            ("xyzzy", "write 'retry', 'skip', 'wait', 'fail', 'coalesce'"),
            (None, "cannot be of type NoneType: write 'retry'"),
            (30, "cannot be of type int"),
            (Conflict.retry, "write 'retry' or Conflict.retry()"),
            (Retry, "write 'retry' or Conflict.retry()"),
            ({"name": "retyr"}, "did you mean 'retry'?"),
            ({"max_wait": 5}, "cannot be None: write 'retry'"),
            ({"name": "retry", "max_wiat": 5}, "retry has no option 'max_wiat': did you mean 'max_wait'?"),
            ({"name": "fail", "timeout": 5}, "fail has no option 'timeout': it takes none"),
            ({"name": "retry", "max_wait": -5}, "max_wait is -5: write more than 0 seconds"),
        ],
    )
    def test_refuses_what_is_no_policy(self, value: object, said: str) -> None:
        """The message names the option, and what was probably meant."""
        with pytest.raises(ConfigError) as raised:
            Conflict.parse(value, "etcd_lock_on_conflict")
        assert "etcd_lock_on_conflict" in str(raised.value)
        assert said in str(raised.value)

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: Conflict.retry(5, backoff=1), "write either countdown, or them"),
            (lambda: Conflict.retry(5, backoff_max=10), "write either countdown, or them"),
            (lambda: Retry(countdown=5, backoff=2), "write either countdown, or them"),
            (lambda: Conflict.retry(0), "countdown is 0: write more than 0 seconds"),
            (lambda: Conflict.retry(backoff="1"), "backoff is '1': write seconds, as a number"),  # type: ignore[arg-type]
            (lambda: Conflict.retry(backoff=True), "backoff is True: write seconds"),
            (lambda: Conflict.retry(backoff=math.nan), "backoff is nan: write seconds"),
            (lambda: Conflict.retry(backoff=-1), "backoff is -1: write more than 0"),
            (lambda: Conflict.retry(backoff=5, backoff_max=2), "backoff_max=2 is shorter than backoff=5"),
            (lambda: Conflict.retry(jitter=1), "jitter is 1: write True or False"),  # type: ignore[arg-type]
            (lambda: Conflict.retry(max_wait=0), 'write "fail" or "skip"'),
            (lambda: Conflict.retry(then="wait"), "then is 'wait': write 'fail' or 'skip'"),  # type: ignore[arg-type]
            (lambda: Conflict.retry(then="ignore"), "then is 'ignore': did you mean 'skip'?"),  # type: ignore[arg-type]
            (lambda: Conflict.skip(result=object()), "result is of type object, which is no plain JSON"),
            (lambda: Conflict.skip(chain="stop"), "chain is 'stop': write 'fail' or 'continue'"),  # type: ignore[arg-type]
            (lambda: Conflict.wait(timeout=0), 'write "retry"'),
            (lambda: Conflict.wait(timeout=None), "timeout is None: write seconds"),  # type: ignore[arg-type]
            (lambda: Conflict.wait(then="rety"), "then is 'rety': did you mean 'retry'?"),  # type: ignore[arg-type]
            (lambda: Conflict.wait(then=Conflict.fail()), "write 'retry' or 'skip' or 'fail'"),  # type: ignore[arg-type]
        ],
    )
    def test_refuses_what_cannot_work(self, make: Any, said: str) -> None:
        """A policy that cannot work is not made, and the message says what to write."""
        with pytest.raises(ConfigError) as raised:
            make()
        assert "Conflict." in str(raised.value)
        assert said in str(raised.value)

    def test_the_result_is_a_copy(self) -> None:
        """Nobody changes a policy by changing the result that it was given, or that it gave."""
        mine = {"rows": [1]}
        policy = Conflict.skip(mine)
        mine["rows"].append(2)
        given = decide(policy)
        assert given == SkipRun({"rows": [1]}, "fail")
        assert isinstance(given, SkipRun)
        given.result["rows"].append(3)
        assert decide(policy) == SkipRun({"rows": [1]}, "fail")

    def test_nearest_is_none_where_nothing_is_near(self) -> None:
        """A suggestion is made only where there is a likely one."""
        assert nearest("ttll", ["ttl", "timeout"]) == "ttl"
        assert nearest("zebra", ["ttl", "timeout"]) is None


class TestDecides:
    @pytest.mark.parametrize(
        ("policy", "case", "action"),
        [
            (Conflict.retry(jitter=False), {"waits": 0}, PutBack(1)),
            (Conflict.retry(jitter=False), {"waits": 2}, PutBack(4)),
            (Conflict.retry(jitter=False), {"waits": 100_000}, PutBack(10)),
            (Conflict.retry(), {"waits": 3, "random": 0.5}, PutBack(4)),
            (Conflict.retry(), {"waits": 3, "random": 0.0}, PutBack(0.8)),
            (Conflict.retry(backoff=0.1), {"random": 0.0}, PutBack(0.05)),
            (Conflict.retry(7), {"waits": 9, "random": 0.0}, PutBack(7)),
            (Conflict.retry(7), {"waited": 3599}, PutBack(1)),
            (Conflict.retry(7), {"waited": 3600}, Refuse()),
            (Conflict.retry(7, max_wait=10, then="skip"), {"waited": 10}, SkipRun(None, "fail")),
            (Conflict.retry(7, max_wait=None), {"waited": 1e9}, PutBack(7)),
            (Conflict.retry(7200, max_wait=None), {"ceiling": 1800}, PutBack(1800)),
            (Conflict.skip(3, chain="continue"), {}, SkipRun(3, "continue")),
            (Conflict.fail(), {}, Refuse()),
            (Conflict.wait(4), {}, WaitInPlace(4)),
            (Conflict.wait(4), {"waited": 1e9}, WaitInPlace(4)),
            (Conflict.wait(4), {"timed_out": True, "waits": 1, "random": 0.5}, PutBack(1)),
            (Conflict.wait(4), {"timed_out": True, "waited": 3600}, Refuse()),
            (Conflict.wait(4, then="skip"), {"timed_out": True}, SkipRun(None, "fail")),
            (Conflict.wait(4, then="fail"), {"timed_out": True}, Refuse()),
            (Conflict.coalesce(), {"others_wait": True}, SkipRun(None, "fail")),
            (Conflict.coalesce(), {"waited": 1e9, "waits": 1, "random": 0.5}, PutBack(1)),
        ],
    )
    def test_what_each_policy_does(self, policy: Conflict, case: dict[str, Any], action: Action) -> None:
        """The table of outcomes."""
        assert decide(policy, **case) == action

    @pytest.mark.parametrize("policy", POLICIES, ids=repr)
    def test_its_own_ghost_is_outwaited(self, policy: Conflict) -> None:
        """Against a contender with the same task id every policy puts the message back, and never gives up."""
        assert decide(policy, same_task=True, waits=1, waited=1e9, timed_out=True, others_wait=True) == PutBack(1)

    @given(
        waits=st.integers(0, 10_000),
        waited=st.floats(0, 1e6),
        ceiling=st.floats(1, 1e5),
        random=st.floats(0, 1, exclude_max=True),
        backoff=st.floats(0.001, 1e4),
        same_task=st.booleans(),
    )
    def test_countdowns_are_bounded(
        self, waits: int, waited: float, ceiling: float, random: float, backoff: float, *, same_task: bool
    ) -> None:
        """Nobody spins, nobody waits longer than the broker stands or than the policy says."""
        policy = Conflict.retry(backoff=backoff)
        action = decide(policy, waits=waits, waited=waited, ceiling=ceiling, random=random, same_task=same_task)
        if isinstance(action, Refuse):
            assert waited >= 3600
            assert not same_task
        else:
            assert isinstance(action, PutBack)
            assert 0.05 <= action.countdown <= min(ceiling, max(policy.backoff_max, 0.05))
