"""Settings: every way in which Celery people set things, and every way in which they are refused."""

from __future__ import annotations

import gc
import ssl
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, current_app

from celery_etcd_lock.etcd import TLS
from celery_etcd_lock.exceptions import ConfigError
from celery_etcd_lock.settings import DEFAULT_ENDPOINTS, ENDPOINTS_VARIABLE, Settings
from celery_etcd_lock.tasks.conflict import Conflict


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (ENDPOINTS_VARIABLE, "CELERY_CONFIG_MODULE"):
        monkeypatch.delenv(variable, raising=False)


def new_app(**settings: Any) -> Celery:
    return Celery("proj", set_as_current=False, **settings)


def module(**names: Any) -> types.ModuleType:
    made = types.ModuleType("celeryconfig")
    vars(made).update(names)
    return made


def configured(source: Any, namespace: str | None = None, **settings: Any) -> Celery:
    app = new_app(**settings)
    app.config_from_object(source, namespace=namespace)
    return app


def by_attribute() -> Celery:
    app = new_app()
    app.conf.etcd_lock_ttl = 7
    return app


def by_update() -> Celery:
    app = new_app()
    app.conf.update(etcd_lock_ttl=7)
    return app


def by_upper_case_update() -> Celery:
    app = new_app()
    app.conf.update(ETCD_LOCK_TTL=7)
    return app


class Plain:
    etcd_lock_ttl = 7


class LowerNamespace:
    celery_etcd_lock_ttl = 7


WAYS: dict[str, Callable[[], Celery]] = {
    "constructor": lambda: new_app(etcd_lock_ttl=7),
    "upper case constructor": lambda: new_app(ETCD_LOCK_TTL=7),
    "attribute": by_attribute,
    "update": by_update,
    "upper case update": by_upper_case_update,
    "module": lambda: configured(module(etcd_lock_ttl=7)),
    "upper case module": lambda: configured(module(ETCD_LOCK_TTL=7)),
    "upper case module with Celery's own": lambda: configured(module(ETCD_LOCK_TTL=7, BROKER_URL="memory://")),
    "object": lambda: configured(Plain),
    "instance": lambda: configured(Plain()),
    "dict": lambda: configured({"etcd_lock_ttl": 7}),
    "namespace": lambda: configured(module(CELERY_ETCD_LOCK_TTL=7), "CELERY"),
    "another namespace": lambda: configured(module(QUEUE_ETCD_LOCK_TTL=7), "QUEUE"),
    "lower case namespace": lambda: configured(LowerNamespace, "celery"),
    "under a namespace, but without it": lambda: configured(module(etcd_lock_ttl=7), "CELERY"),
    "constructor, under a namespace": lambda: configured(
        module(CELERY_BROKER_URL="memory://"), "CELERY", etcd_lock_ttl=7
    ),
    "namespace of the constructor": lambda: new_app(namespace="CELERY", etcd_lock_ttl=7),
}


class TestRead:
    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    def test_however_it_is_set(self, way: Callable[[], Celery]) -> None:
        """A setting is read from wherever Celery's own are."""
        assert Settings.from_app(way()).ttl == 7

    def test_from_django(self) -> None:
        """Django's settings, under the namespace that Celery's documentation gives them."""
        conf = pytest.importorskip("django.conf")
        settings = conf.LazySettings()
        settings.configure(CELERY_ETCD_LOCK_TTL=7, CELERY_ETCD_LOCK_ON_CONFLICT="skip", CELERY_BROKER_URL="memory://")
        read = Settings.from_app(configured(settings, "CELERY"))
        assert (read.ttl, read.on_conflict) == (7, Conflict.skip())
        wrong = conf.LazySettings()
        wrong.configure(CELERY_ETCD_LOCK_TLL=7)
        with pytest.raises(ConfigError, match="CELERY_ETCD_LOCK_TLL is no setting: did you mean CELERY_ETCD_LOCK_TTL"):
            Settings.from_app(configured(wrong, "CELERY"))

    def test_from_a_module_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By its name to config_from_object, and by CELERY_CONFIG_MODULE: lazily, when first looked at."""
        (tmp_path / "etcd_lock_test_config.py").write_text("etcd_lock_ttl = 7\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert Settings.from_app(configured("etcd_lock_test_config")).ttl == 7
        monkeypatch.setenv("CELERY_CONFIG_MODULE", "etcd_lock_test_config")
        assert Settings.from_app(Celery("proj", loader="default", set_as_current=False)).ttl == 7

    @pytest.mark.parametrize("lazy", [True, False])
    def test_set_after_tasks_are_defined(self, *, lazy: bool) -> None:
        """Nothing is read before it is asked for."""

        def early() -> None: ...

        app = new_app()
        app.task(name="early", lazy=lazy)(early)
        app.config_from_object(module(CELERY_ETCD_LOCK_TTL=7), namespace="CELERY")
        assert Settings.from_app(app).ttl == 7

    def test_on_conf_comes_before_the_module(self) -> None:
        """What is set on app.conf after reading a module goes over it, as with Celery's own."""
        app = configured(module(etcd_lock_ttl=5))
        app.conf.update(etcd_lock_ttl=7)
        assert Settings.from_app(app).ttl == 7

    def test_defaults(self) -> None:
        """Without any setting."""
        settings = Settings.from_app(new_app())
        assert settings == Settings()
        assert settings.endpoints == DEFAULT_ENDPOINTS == ("http://127.0.0.1:2379",)
        assert settings.default_endpoints
        assert (settings.ttl, settings.timeout, settings.queued_ttl, settings.done_ttl) == (30, 5, 86400, 3600)
        assert (settings.beat_scheduler, settings.beat_name, settings.beat_ttl) == (None, "default", 15)
        assert settings.on_conflict == Conflict.retry()
        assert (settings.on_lost, settings.on_unavailable, settings.namespace) == ("abort", "retry", "celery")
        assert (settings.enabled, settings.eager, settings.hide_arguments) == (True, False, False)
        assert (settings.username, settings.password, settings.use_ssl, settings.client) == (None, None, None, None)
        assert settings.transport == "gateway"

    def test_none_is_not_set(self) -> None:
        """What an environment did not give is as good as not set."""
        assert Settings.from_app(new_app(etcd_lock_ttl=None, etcd_lock_endpoints=None)) == Settings()

    def test_endpoints_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The variable counts where the setting is not there, and is named when it is wrong."""
        monkeypatch.setenv(ENDPOINTS_VARIABLE, "http://a:1, http://b:2/")
        settings = Settings.from_app(new_app())
        assert settings.endpoints == ("http://a:1", "http://b:2")
        assert not settings.default_endpoints
        assert Settings.from_app(new_app(etcd_lock_endpoints="http://c:3")).endpoints == ("http://c:3",)
        monkeypatch.setenv(ENDPOINTS_VARIABLE, "a:1")
        with pytest.raises(ConfigError, match=rf"{ENDPOINTS_VARIABLE} \(in the environment\): .*write http://a:1"):
            Settings.from_app(new_app())

    @pytest.mark.parametrize(
        ("given", "name", "meant"),
        [
            ({"etcd_lock_endpoints": ["https://a:1", "https://b"]}, "endpoints", ("https://a:1", "https://b")),
            ({"etcd_lock_endpoints": "memory://x"}, "endpoints", ("memory://x",)),
            ({"etcd_lock_endpoints": "http://[::1]:2379"}, "endpoints", ("http://[::1]:2379",)),
            ({"etcd_lock_ttl": 30.0}, "ttl", 30),
            ({"etcd_lock_timeout": 2}, "timeout", 2.0),
            ({"etcd_lock_timeout": 10}, "beat_ttl", 30),
            ({"etcd_lock_timeout": 1}, "beat_ttl", 15),
            ({"etcd_lock_on_conflict": {"name": "skip", "result": 1}}, "on_conflict", Conflict.skip(1)),
            ({"etcd_lock_on_conflict": Conflict.wait(3)}, "on_conflict", Conflict.wait(3)),
            ({"etcd_lock_enabled": "observe"}, "enabled", "observe"),
            ({"etcd_lock_enabled": False}, "enabled", False),
            ({"etcd_lock_use_ssl": False}, "use_ssl", None),
            ({"etcd_lock_use_ssl": True, "etcd_lock_endpoints": "https://a"}, "use_ssl", TLS()),
            ({"etcd_lock_use_ssl": True, "etcd_lock_endpoints": "memory://"}, "use_ssl", TLS()),
            ({"etcd_lock_endpoints": "https://a"}, "use_ssl", None),
            ({"etcd_lock_transport": "gateway"}, "transport", "gateway"),
            ({"etcd_lock_beat_scheduler": "proj.Scheduler"}, "beat_scheduler", "proj.Scheduler"),
            ({"ETCD_LOCK_BEAT_NAME": "nights"}, "beat_name", "nights"),
        ],
    )
    def test_what_is_meant(self, given: dict[str, Any], name: str, meant: object) -> None:
        """Settings hold what was meant, in one form and one type."""
        value = getattr(Settings.from_app(new_app(**given)), name)
        assert (value, type(value)) == (meant, type(meant))

    @pytest.mark.parametrize("written", ["none", "CERT_NONE", ssl.CERT_NONE])
    def test_certificates(self, written: object) -> None:
        """What Celery's Redis calls cert_reqs is understood in each of its spellings."""
        ca = ssl.get_default_verify_paths().cafile
        settings = Settings.from_app(
            new_app(etcd_lock_endpoints="https://a", etcd_lock_use_ssl={"ca_certs": ca, "cert_reqs": written})
        )
        assert settings.use_ssl == TLS(ca_certs=ca, cert_reqs="none")

    def test_is_read_once(self) -> None:
        """Until told to forget, an app's settings are the same object; and they do not keep the app alive."""
        app = new_app(etcd_lock_ttl=7)
        settings = Settings.from_app(app)
        app.conf.update(etcd_lock_ttl=8)
        assert Settings.from_app(app) is settings
        Settings.forget(app)
        assert Settings.from_app(app).ttl == 8
        assert Settings.from_app(new_app()).ttl == 30
        gone = weakref.ref(settings)
        del settings
        gc.collect()
        assert gone() is None

    def test_the_current_app(self) -> None:
        """A proxy is as good as the app behind it."""
        app = Celery("proj", etcd_lock_ttl=7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("celery._state.get_current_app", lambda: app)
            assert Settings.from_app(current_app).ttl == Settings.from_app(current_app).ttl

    def test_frozen_and_discreet(self) -> None:
        """Nobody changes them, and the password is not shown."""
        settings = Settings.from_app(new_app(etcd_lock_username="root", etcd_lock_password="hunter2"))
        assert settings.password == "hunter2"
        assert "hunter2" not in repr(settings)
        with pytest.raises(AttributeError):
            settings.ttl = 5  # type: ignore[misc]

    def test_connects(self) -> None:
        """A transport to where they say."""
        transport = Settings.from_app(new_app(etcd_lock_endpoints="memory://settings")).connect()
        assert transport.endpoints == ("memory://settings",)
        transport.close()


def refusal(app: Celery) -> str:
    with pytest.raises(ConfigError) as raised:
        Settings.from_app(app)
    return str(raised.value)


class TestMisspelt:
    @pytest.mark.parametrize(
        ("given", "right"),
        [
            ("etcd_lock_tll", "did you mean etcd_lock_ttl?"),
            ("etcd_lock_endpoint", "did you mean etcd_lock_endpoints?"),
            ("etcd_lock_url", "did you mean etcd_lock_endpoints?"),
            ("etcd_lock_expiry", "did you mean etcd_lock_ttl?"),
            ("etcd_lock_ssl", "did you mean etcd_lock_use_ssl?"),
            ("etcd_lock_on_conflct", "did you mean etcd_lock_on_conflict?"),
            ("etcd_locks_ttl", "did you mean etcd_lock_ttl"),
            ("etcdlock_ttl", "did you mean etcd_lock_ttl"),
            ("ETCD_LOCK_TLL", "did you mean ETCD_LOCK_TTL?"),
            ("Etcd_Lock_Ttl", "write etcd_lock_ttl"),
            ("CELERY_ETCD_LOCK_TTL", 'write ETCD_LOCK_TTL, or read the configuration with namespace="CELERY"'),
            ("celery_etcd_lock_ttl", "write etcd_lock_ttl"),
            ("CELERY_ETCD_LOCK_TLL", "did you mean ETCD_LOCK_TTL?"),
            ("etcd_lock_zebra", "they are etcd_lock_endpoints, etcd_lock_transport"),
            ("etcd_lock_", "they are etcd_lock_endpoints"),
        ],
    )
    def test_without_a_namespace(self, given: str, right: str) -> None:
        """The name is quoted, with the nearest right one in the same style."""
        message = refusal(configured(module(**{given: 7})))
        assert message.startswith(f"{given} is ")
        assert right in message

    @pytest.mark.parametrize(
        ("given", "right"),
        [
            ("CELERY_ETCD_LOCK_TLL", "did you mean CELERY_ETCD_LOCK_TTL?"),
            ("CELERY_ETCD_LOCK_ZEBRA", "they are CELERY_ETCD_LOCK_ENDPOINTS"),
            ("ETCD_LOCK_TTL", "write CELERY_ETCD_LOCK_TTL, as the configuration is read with namespace='CELERY'"),
            ("ETCD_LOCK_TLL", "did you mean CELERY_ETCD_LOCK_TTL?"),
            ("etcd_lock_tll", "did you mean etcd_lock_ttl?"),
        ],
    )
    def test_under_a_namespace(self, given: str, right: str) -> None:
        """The namespace is part of the right name."""
        message = refusal(configured(module(**{given: 7}), "CELERY"))
        assert message.startswith(f"{given} is ")
        assert right in message

    def test_is_found_on_conf_too(self) -> None:
        """Wherever it was set."""
        app = new_app()
        app.conf.etcd_lock_tll = 7
        assert "did you mean etcd_lock_ttl?" in refusal(app)

    @pytest.mark.parametrize(
        ("names", "namespace"),
        [
            ({"ETCD_LOCK_DIR": "/run"}, "CELERY"),
            ({"CELERY_ETCD_LOCK_TTL": 7, "ETCD_LOCK_TTL": 7}, "CELERY"),
            ({"etcd_lock_ttl": 7, "CELERY_ETCD_LOCK_TTL": 7}, None),
            ({"etcd_lock_make_client": lambda: None, "etcd_lock_tools": types, "etcd_lock_kind": Plain}, None),
            ({"etcd_url": "x", "lock_ttl": 3, "etcdlike": 1}, None),
        ],
    )
    def test_leaves_others_alone(self, names: dict[str, Any], namespace: str | None) -> None:
        """What belongs to somebody else, or helps to make a setting, is no setting of ours."""
        assert Settings.from_app(configured(module(**names), namespace)).ttl in (7, 30)

    def test_set_twice(self) -> None:
        """Two spellings that differ are refused; which one was meant cannot be told."""
        message = refusal(configured(module(etcd_lock_ttl=7, ETCD_LOCK_TTL=8)))
        assert message == "ETCD_LOCK_TTL and etcd_lock_ttl are both set, and differ: leave one out"


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("endpoints", "etcd:2379", "write http://etcd:2379"),
            ("endpoints", "127.0.0.1:2379", "write http://127.0.0.1:2379"),
            ("endpoints", "redis://etcd:6379", "neither http nor https"),
            ("endpoints", "http://", "names no host"),
            ("endpoints", "http://etcd:port", "is no URL"),
            ("endpoints", "http://etcd:2379/v3", "something behind host and port"),
            ("endpoints", ["http://a", "b:1"], "write http://b:1"),
            ("endpoints", "memory://,http://a", "memory:// stands by itself"),
            ("endpoints", " , ", "is empty: write a URL, like http://127.0.0.1:2379"),
            ("endpoints", [], "is empty"),
            ("endpoints", 2379, "is of type int: write a URL"),
            ("endpoints", ["http://a", None], "is of type list: write a URL"),
            ("transport", "gatway", "did you mean 'gateway'?"),
            ("client", "client", "write a function that gives an etcd3.Etcd3Client, or its dotted path"),
            ("client", 5, "write a function that gives an etcd3.Etcd3Client, or its dotted path"),
            ("client", types.SimpleNamespace(channel=None), "write a function that makes one"),
            ("username", 5, "is of type int: write a string"),
            ("username", "", "is empty"),
            ("use_ssl", {"ssl_ca_certs": "x"}, "has no key 'ssl_ca_certs': write ca_certs"),
            ("use_ssl", {"ssl_certfile": "x"}, "write certfile"),
            ("use_ssl", {"ssl_cert_reqs": "x"}, "write cert_reqs"),
            ("use_ssl", {"cert": "x"}, "write certfile"),
            ("use_ssl", {"zebra": "x"}, "write ca_certs, certfile, keyfile, cert_reqs"),
            ("use_ssl", {"cert_reqs": "maybe"}, "write 'required' or 'optional' or 'none'"),
            ("use_ssl", {"ca_certs": 5}, '["ca_certs"] is of type int: write the path of a file'),
            ("use_ssl", {"ca_certs": "no/such.pem"}, "no/such.pem"),
            ("use_ssl", {"certfile": "no/such.pem"}, "no/such.pem"),
            ("use_ssl", {"keyfile": "key.pem"}, "without a certfile"),
            ("use_ssl", "ca.pem", 'is of type str: write True, or a dict like {"ca_certs": "ca.pem"}'),
            ("namespace", "", "write one word"),
            ("namespace", "a/b", "(no '/')"),
            ("namespace", "two words", "write one word"),
            ("ttl", 1, "write 2 seconds or more: etcd itself grants no shorter lease"),
            ("ttl", 2.5, "write a number of whole seconds"),
            ("ttl", "30", "a string: write a number of whole seconds, without the quotes: 30"),
            ("ttl", "soon", "a string: write a number of whole seconds"),
            ("ttl", True, "write a number of whole seconds"),
            ("ttl", float("nan"), "write a number of whole seconds"),
            ("timeout", 0, "write 0.01 seconds or more"),
            ("timeout", "5", "without the quotes: 5"),
            ("timeout", -1, "write 0.01 seconds or more"),
            ("on_conflict", "skpi", "did you mean 'skip'?"),
            ("on_conflict", {"name": "retry", "max_wiat": 1}, "did you mean 'max_wait'?"),
            ("on_conflict", 5, "cannot be of type int"),
            ("on_conflict", "coalese", "did you mean 'coalesce'?"),
            ("on_lost", "abrt", "did you mean 'abort'?"),
            ("on_lost", "x", "write 'abort' or 'retry' or 'warn'"),
            ("on_unavailable", "wait", "write 'retry' or 'fail' or 'run'"),
            ("enabled", "true", "write True or False or 'observe'"),
            ("enabled", 1, "write True or False or 'observe'"),
            ("enabled", "observ", "did you mean 'observe'?"),
            ("eager", "yes", "write True or False"),
            ("hide_arguments", 0, "write True or False"),
            ("queued_ttl", 0, "write 2 seconds or more"),
            ("done_ttl", "3600", "without the quotes: 3600"),
            ("beat_scheduler", 5, "write a scheduler's class, or its dotted path"),
            ("beat_name", "a/b", "write one word"),
            ("beat_ttl", 14, "write 15 or more, the time for three renewals of etcd_lock_timeout (5 seconds) each"),
            ("beat_ttl", "15", "without the quotes: 15"),
        ],
    )
    def test_says_what_to_write(self, name: str, value: object, said: str) -> None:
        """The message begins with the setting, as it was spelt, and ends with what to write."""
        message = refusal(new_app(**{f"etcd_lock_{name}": value}))
        assert message.startswith(f"etcd_lock_{name}")
        assert said in message
        assert "\n" not in message
        spelt = f"CELERY_ETCD_LOCK_{name.upper()}"
        assert refusal(configured(module(**{spelt: value}), "CELERY")).startswith(spelt)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"username": "root"}, "etcd_lock_username is set without etcd_lock_password: set both"),
            ({"password": "hunter2"}, "etcd_lock_password is set without etcd_lock_username: set both"),
            (
                {"use_ssl": True, "endpoints": "https://a,http://b:1"},
                "etcd_lock_use_ssl is set, and etcd_lock_endpoints has http://b:1, which is without TLS: write https://b:1",
            ),
            (
                {"client": "a.b", "transport": "gateway"},
                "etcd_lock_client is set, and etcd_lock_transport is 'gateway'",
            ),
            ({"client": "a.b", "endpoints": "http://a"}, "etcd_lock_client and etcd_lock_endpoints are both set"),
            ({"client": "a.b", "use_ssl": True}, "etcd_lock_client and etcd_lock_use_ssl are both set"),
            (
                {"client": "a.b", "username": "root", "password": "hunter2"},
                "etcd_lock_client and etcd_lock_username are both set: the client has its own, leave one out",
            ),
            ({"transport": "grpc", "use_ssl": {"cert_reqs": "none"}, "endpoints": "https://a"}, "which gRPC cannot do"),
            ({"use_ssl": True}, "and the default of etcd_lock_endpoints has http://127.0.0.1:2379"),
            ({"beat_ttl": 15, "timeout": 6}, "etcd_lock_beat_ttl is 15: write 18 or more"),
        ],
    )
    def test_contradictions(self, given: dict[str, Any], said: str) -> None:
        """Settings that do not go together are both named."""
        message = refusal(new_app(**{f"etcd_lock_{name}": value for name, value in given.items()}))
        assert said in message
        assert "hunter2" not in message

    @pytest.mark.parametrize(
        "endpoints",
        [
            "http://root:hunter2@etcd:2379",
            "root:hunter2@etcd:2379",
            "http://a:1,http://root:hunter2@b:1",
            "http://root:hun,ter2@etcd",
            ["http://root:hun@ter2@etcd:2379"],
            "http://root:hunter2#@etcd:x",
        ],
    )
    def test_a_password_is_not_repeated(self, endpoints: object) -> None:
        """Credentials in a URL are refused, and no part of them gets into a log by that."""
        message = refusal(new_app(etcd_lock_endpoints=endpoints))
        assert message.startswith("etcd_lock_endpoints has a user or password inside a URL")
        assert "etcd_lock_password" in message
        assert not any(part in message for part in ("hunter2", "hun", "ter2", "root"))
        assert "hunter2" not in refusal(new_app(etcd_lock_username="root", etcd_lock_password=["hunter2"]))

    def test_all_problems_at_once(self) -> None:
        """A line for each, so that nobody has to start the worker five times."""
        app = new_app(etcd_lock_tll=3, etcd_lock_ttl=1, etcd_lock_on_lost="x", etcd_lock_endpoints="etcd:1")
        lines = refusal(app).splitlines()
        assert [line.split()[0].rstrip(":") for line in lines] == [
            "etcd_lock_tll",
            "etcd_lock_endpoints",
            "etcd_lock_ttl",
            "etcd_lock_on_lost",
        ]

    def test_at_every_call(self) -> None:
        """A refusal is not remembered as settings."""
        app = new_app(etcd_lock_ttl=1)
        assert refusal(app) == refusal(app)
        app.conf.update(etcd_lock_ttl=2)
        assert Settings.from_app(app).ttl == 2

    def test_made_by_hand(self) -> None:
        """Settings check themselves, wherever they come from."""
        with pytest.raises(ConfigError, match="etcd_lock_ttl is 1"):
            Settings(ttl=1)
