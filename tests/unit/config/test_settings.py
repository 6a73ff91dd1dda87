"""Settings: one declaration for file, configspec and defaults; problems of every file at once."""

import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import hypothesis
import pytest
from configobj import ConfigObj
from configobj.validate import Validator
from hypothesis import given
from hypothesis import strategies as st

from casync_updater.config.settings import (
    CHECKS,
    KEYS,
    commented,
    configspec,
    load_settings,
    settings_files,
)
from casync_updater.model import Settings

ROOT = Path(__file__).parents[3]


def written(folder: Path, text: str, name: str = "casync-updater.conf") -> Path:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def test_labels_may_have_any_name_a_folder_can_have(tmp_path: Path) -> None:
    text = '[media]\nlabels = UPDATES, My Own, "a$b`c;d, e", UPDATES\non_start = "a, b"\n'
    media = load_settings(written(tmp_path, text)).settings.media
    assert media.labels == ("UPDATES", "My Own", "a$b`c;d, e")
    assert media.on_start == "a, b"
    assert load_settings(written(tmp_path, "[media]\nlabels =\n")).settings.media.labels == ()


def test_the_installed_file_is_made_from_the_declarations() -> None:
    installed = (ROOT / "conf" / "casync-updater.conf").read_text(encoding="utf-8")
    assert installed == commented()
    assert load_settings(ROOT / "conf" / "casync-updater.conf") == (Settings(), (), ())


def test_every_field_has_a_declaration_and_the_other_way_round() -> None:
    declared = {section: list(keys) for section, keys in KEYS.items()}
    in_model = {
        section.name: [field.name for field in fields(getattr(Settings(), section.name))]
        for section in fields(Settings)
    }
    assert {name: sorted(keys) for name, keys in declared.items()} == {
        name: sorted(keys) for name, keys in in_model.items()
    }


def test_the_installed_file_with_every_key_active_says_the_defaults(tmp_path: Path) -> None:
    active = re.sub(r"^#(\w+ =)", r"\1", commented(), flags=re.MULTILINE)
    assert active.count("\n") == commented().count("\n")
    assert load_settings(written(tmp_path, active)) == (Settings(), (), ())


def test_the_configspec_has_the_same_defaults() -> None:
    spec = ConfigObj({}, configspec=configspec(), interpolation=False)
    assert spec.validate(Validator(dict(CHECKS))) is True
    assert {name: dict(spec[name]) for name in spec.sections} == asdict(Settings())


def test_without_files_the_defaults_count() -> None:
    assert load_settings(None) == (Settings(), (), ())


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    certificates = written(tmp_path, "x", "ca,%s.pem")
    file = written(
        tmp_path,
        f"""
        [online]
        enabled = no  # for now
        hosts = Update.example, 192.0.2.1:8080, "[2001:db8::1]:80", 2001:db8::2, fe80::1%eth0
        method = tcp
        interval_online = 0.5
        min_age = 0
        splay = 0
        [fetch]
        connections = 2
        ca_bundle = "{certificates}"
        [trust]
        require = yes
        keyrings = /etc/vendor
        """,
    )
    settings, problems, warnings = load_settings(file)
    assert (problems, warnings) == ((), ())
    assert settings.online.enabled is False
    assert settings.online.hosts == (
        ("update.example", 443),
        ("192.0.2.1", 8080),
        ("2001:db8::1", 80),
        ("2001:db8::2", 443),
        ("fe80::1%eth0", 443),
    )
    assert (settings.online.interval_online, settings.online.splay) == (0.5, 0.0)
    assert (settings.fetch.connections, settings.fetch.ca_bundle) == (2, certificates)
    assert (settings.trust.require, settings.trust.keyrings) == (True, Path("/etc/vendor"))


def test_a_single_host_is_a_list_of_one(tmp_path: Path) -> None:
    file = written(tmp_path, "[online]\nhosts = update.example\n")
    assert load_settings(file).settings.online.hosts == (("update.example", 443),)


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("online", "enabled = maybe", "write yes or no"),
        ("online", "enabled = yes, no", "is a list"),
        ("online", "hosts = http://update.example/", "no URLs"),
        ("online", "hosts = a b", "no URLs"),
        ("media", "labels = a/b", "without '/'"),
        ("media", "labels = UPDATES, ..", "without '/'"),
        ("media", "on_start = echo a, b", "put quotes around the whole command"),
        ("online", "hosts = a:b", "no URLs"),
        ("online", "hosts = a:70000", "no URLs"),
        ("online", "hosts = a:0", "no URLs"),
        ("online", "hosts = :80", "no URLs"),
        ("online", "hosts = me@host", "no URLs"),
        ("online", "hosts = [fd00::1", "no URLs"),
        ("online", "hosts = [name]:80", "no URLs"),
        ("online", "method = ping", "auto or icmp or tcp"),
        ("online", "method = auto, tcp", "auto or icmp or tcp"),
        ("online", "interval_offline = 0", "from 0.01"),
        ("online", "interval_online = -1", "from 0.01"),
        ("online", "interval_online = nan", "a number of seconds"),
        ("online", "interval_online = inf", "a number of seconds"),
        ("online", "interval_online = 10s", "a number of seconds"),
        ("online", "interval_online =", "a number of seconds"),
        ("online", "splay = -0.1", "from 0"),
        ("fetch", "connections = 0", "from 1 to 64"),
        ("fetch", "connections = 1.5", "a whole number"),
        ("fetch", "min_rate = 0", "from 1"),
        ("fetch", "retries = -1", "from 0"),
        ("fetch", "ca_bundle = ca.pem", "an absolute path"),
        ("fetch", "ca_bundle = /nonexistent/ca.pem", "no file that can be read"),
        ("fetch", "ca_bundle = /etc", "no file that can be read"),
        ("fetch", "ca_bundle = /a, /b", "is a list"),
        ("fetch", "client_key = /etc/passwd", "no client_cert"),
        ("trust", "keyrings = keyrings", "an absolute path"),
        ("actions", "directory = /nonexistent", "no folder"),
        ("actions", "timeout = 0", "from 0.01"),
        ("daemon", "verify_interval = 1e99", "31622400"),
        ("daemon", "verify_intervall = 5", "did you mean 'verify_interval'"),
        ("daemon", "splay = 5", "belongs into the section [online]"),
        ("online", "[[hosts]]", "is a section"),
    ],
)
def test_a_wrong_value_is_reported_by_file_section_and_key(
    tmp_path: Path, section: str, line: str, message: str
) -> None:
    file = written(
        tmp_path,
        f"[{section}]\n{line}\n[trust]\nrequire = on\n".replace(
            "[trust]\nrequire = on\n" if section == "trust" else "\0", ""
        ),
    )
    settings, problems, warnings = load_settings(file)
    key = re.split(r"[ =\[\]]+", line.strip("["))[0]
    (problem,) = problems
    assert problem.startswith(f"{file}: [{section}] {key}: ")
    assert message in problem
    assert warnings == ()
    assert settings.trust.require is (section != "trust")
    if key != "client_key":
        assert getattr(settings, section) == getattr(Settings(), section)


def test_a_slip_in_require_does_not_let_unsigned_releases_in(tmp_path: Path) -> None:
    settings, problems, _ = load_settings(written(tmp_path, "[trust]\nrequire = ture\n"))
    assert settings.trust.require is True
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[onlin]\nsplay = 1", "[onlin]: is no known section; did you mean [online]?"),
        ("splay = 1", "splay: stands before the first section; is it 'splay' of [online]?"),
        ("online = 1", "online: is a section"),
        ("[online]\nsplay 1", "line 2: 'splay 1' is neither"),
        ("[online]\nsplay = 1\nsplay = 2", "line 3: 'splay = 2' stands more than once"),
        ("[online]\n[fetch]\n[online]", "line 3: '[online]' stands more than once"),
        ('[fetch]\nca_bundle = "/x', "line 2: 'ca_bundle = \"/x' has a quote"),
        ("[[online]]", "line 1: '[[online]]' is neither"),
    ],
)
def test_a_wrong_line_is_reported(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text + "\n[daemon]\nfull_digest = yes\n")
    settings, problems, _ = load_settings(file)
    (problem,) = problems
    assert problem.startswith(f"{file}: {message}")
    assert settings.daemon.full_digest


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("[vendor]\nx = 1", "[vendor]: is no known section"),
        ("comment = x", "comment: stands before the first section: no effect"),
        ("[fetch]\ncomment = x", "[fetch] comment: is no known key"),
    ],
)
def test_what_has_no_effect_is_a_warning(tmp_path: Path, text: str, warning: str) -> None:
    settings, problems, warnings = load_settings(written(tmp_path, text))
    assert (settings, problems) == (Settings(), ())
    assert warning in warnings[0]


def test_drop_ins_go_before_the_file_in_the_order_of_their_names(tmp_path: Path) -> None:
    written(tmp_path, "[online]\nsplay = 1\nmin_age = 1\n[fetch]\nretries = 1\n")
    written(tmp_path, "[online]\nsplay = 3\n", "casync-updater.conf.d/20.conf")
    written(tmp_path, "[online]\nsplay = 2\nmin_age = 2\n", "casync-updater.conf.d/10.conf")
    written(tmp_path, "nonsense", "casync-updater.conf.d/30.conf~")
    written(tmp_path, "nonsense", "casync-updater.conf.d/.hidden.conf")
    settings, problems, _ = load_settings(*settings_files(tmp_path))
    assert problems == ()
    assert (settings.online.splay, settings.online.min_age, settings.fetch.retries) == (3, 2, 1)


def test_problems_of_every_file_are_reported_at_once(tmp_path: Path) -> None:
    first = written(tmp_path, "[online]\nsplay = x\nmin_age = y\n")
    second = written(tmp_path, "[fetch]\nretries = z\n", "casync-updater.conf.d/a.conf")
    third = tmp_path / "casync-updater.conf.d" / "b.conf"
    third.write_bytes(b"\xff")
    settings, problems, _ = load_settings(*settings_files(tmp_path))
    assert settings == Settings()
    assert [problem.split(": ")[0] for problem in problems] == list(
        map(str, (first, first, second, third))
    )


def test_where_settings_are_read_from(tmp_path: Path) -> None:
    entry = written(tmp_path, "{}", "client.json")
    assert settings_files(tmp_path) == (None, ())
    assert settings_files(tmp_path / "missing") == (None, ())
    main = written(tmp_path, "")
    extra = written(tmp_path, "", "casync-updater.conf.d/a.conf")
    assert settings_files(tmp_path) == (main, (extra,))
    assert settings_files(entry) == (None, ())
    other = tmp_path / "other.conf"
    assert settings_files(entry, other) == (other, ())
    assert settings_files(tmp_path, other) == (other, ())
    assert load_settings(*settings_files(entry, other)).problems == (
        f"{other}: cannot be read: No such file or directory",
    )


def test_the_module_does_not_load_configobj_before_it_reads() -> None:
    code = (
        "import sys, casync_updater.config.settings, casync_updater.config.entries;"
        "sys.exit('configobj' in sys.modules)"
    )
    path = str(ROOT / "src")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})


LINES = st.lists(
    st.sampled_from(
        ["[online]", "[fetch]", "[[x]]", "[", "splay = 1", "hosts = a,", "hosts = ,", "ca_bundle ="]
    )
    | st.text(max_size=12)
    | st.builds(
        "{} = {}".format,
        st.sampled_from([name for keys in KEYS.values() for name in keys]),
        st.text(max_size=8),
    ),
    max_size=8,
)


@hypothesis.settings(deadline=None)
@given(LINES)
def test_whatever_the_file_says_nothing_is_raised(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.conf").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    settings, problems, warnings = load_settings(folder / "any.conf")
    assert isinstance(settings, Settings)
    assert all(message.isprintable() for message in problems + warnings)


def test_a_line_of_json_takes_no_age(tmp_path: Path) -> None:
    """ConfigObj would try every way to read its quotes, for hours."""
    text = "[trust]\n{" + '"key": "value", ' * 40 + "= }\nrequire = yes\n"
    settings, problems, _ = load_settings(written(tmp_path, text))
    assert settings.trust.require is True
    assert "line 2" in problems[0]
    assert "more than 20 quotes" in problems[0]
    _, problems, _ = load_settings(written(tmp_path, "[trust]\n# " + '"a", ' * 40 + "\n"))
    assert problems == ()
