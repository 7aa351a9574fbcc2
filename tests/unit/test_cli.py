"""The program: every mistake is one line, the next command and an exit code; --help is there at once."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from tests.commandline import program  # first: it quietens what typer's import warns of

from weft.client.commands.operator import parse_ttl
from weft.client.home import (
    Home,
    Membership,
    WorkerSettings,
    join_address,
    load_member,
    load_settings,
    save_member,
    save_settings,
    split_address,
)
from weft.client.join import read_token, resolve_state, settle
from weft.common.cli import main
from weft.common.errors import AccessError, CorruptState, DataError, StateLocked, UsageError
from weft.common.identity.files import write_private
from weft.common.identity.token import JoinToken, Role
from weft.common.ids import WorkerId

PIN = bytes(range(32))
TOKEN = JoinToken(pin=PIN, token_id="ABCDEF", secret=bytes(16))
MEMBER = Membership(
    address="coord.example.org:7443",
    pin=PIN.hex(),
    ca_pem="",
    tls_name="coordinator.00010203.weft",
    worker_id=WorkerId("w-1"),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WEFT_JOIN_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    return Home(tmp_path / "home")


def remember(
    home: Home, *, pin: bytes = PIN, address: str = MEMBER.address, role: Role = Role.VIEWER
) -> Path:
    directory = home.worker_directory(pin) if role is Role.WORKER else home.viewer_directory(pin)
    member = Membership(
        address=address, pin=pin.hex(), ca_pem="", tls_name="x", worker_id=WorkerId("w-1"), role=role
    )
    save_member(directory, member)
    return directory


def local(home: Home, state: Path, *, pid: int, pin: bytes = PIN, address: str = "127.0.0.1:7443") -> None:
    """What `weft serve` leaves on the coordinator's machine."""
    for directory in (home.root, home.root / "local", state):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    entry = {"address": address, "ca_pem": "CA", "tls_name": "x", "pin": pin.hex(), "worker_id": "operator"}
    write_private(state / "local.json", json.dumps(entry | {"insecure": False}).encode())
    write_private(
        home.root / "local" / f"{state.name}.json", json.dumps({"state": str(state), "pid": pid}).encode()
    )


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "cause", "following"),
    [
        (["bogus"], 2, "No such command 'bogus'", "weft --help"),
        (["pull", "alpha"], 2, "Missing option '--to'", "weft pull --help"),
        (
            ["join", "host:1", "garbage", "--data", "."],
            2,
            "a join token starts with WEFT1.",
            "copy the whole token",
        ),
        (
            ["join", "host:1", "WEFT1.CUT", "--data", "."],
            2,
            "cut off or has a typing error",
            "copy the whole token",
        ),
        (["join", "host:1", ""], 2, "has not joined host:1", "weft join HOST:PORT TOKEN --data PATH"),
        (["join"], 2, "no coordinator was joined from here", "weft join HOST:PORT TOKEN --data PATH"),
        (
            ["join", "--state", "nowhere"],
            2,
            "has joined no coordinator",
            "weft join HOST:PORT TOKEN --data PATH",
        ),
        (["join", "127.0.0.1:1", TOKEN.text], 7, "cannot be reached", "check the address"),
        (["join", "127.0.0.1:1", TOKEN.text, "--rank", "0"], 2, "'--rank'", "weft join --help"),
        (["join", "host:1", TOKEN.text, "--data", "gone"], 3, "gone", "--data"),
        (["join", "a:b:c", TOKEN.text, "--data", "."], 2, "'a:b:c' is not an address", "[::1]:7443"),
        (["join", "127.0.0.1:1", TOKEN.text, "--data", "."], 7, "cannot be reached", "check the address"),
        (["join", "host:1", TOKEN.text, "--data", ".", "--device", "tpu"], 2, "'tpu'", "weft join --help"),
        (["watch"], 2, "no coordinator is known here", "--coordinator HOST:PORT --token TOKEN"),
        (["watch", "--coordinator", "host:1"], 2, "has not joined host:1 as a viewer", "--token TOKEN"),
        (["watch", "--token", TOKEN.text], 2, "a token needs the address", "--coordinator HOST:PORT"),
        (["runs", "list"], 2, "no coordinator is known here", "--coordinator"),
        (["pull", "a/b/c", "--to", "x"], 2, "'b/c' is not a module", "level.expert"),
        (["pull", "Alpha", "--to", "x"], 2, "'Alpha' is not a run name", "lower-case"),
        (["pull", "alpha/0.0@best", "--to", "x"], 2, "@best is for paths", "RUN/path:0.0@best"),
        (["pull", "alpha", "--all", "--as", "hf", "--to", "x"], 2, "--all writes a grid", "leave --as"),
        (["paths", "list"], 2, "no coordinator is known here", "--coordinator"),
        (["modules", "show", "alpha/zero"], 2, "'zero' is not a module", "0.0"),
        (["token", "create", "--ttl", "soon"], 2, "no coordinator is known", "--coordinator"),
        (["eval", "nowhere", "--data", "gone"], 3, "there is no gone", "--data"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_the_next_command(
    home: Home,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    cause: str,
    following: str,
) -> None:
    assert main(arguments) == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("error: ")
    assert cause in said[0]
    assert said[1].startswith("  next: ")
    assert following in said[1]
    assert TOKEN.text not in "".join(said)


def test_a_script_gets_the_error_as_json(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--once", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert (said["error"], said["exit_code"]) == ("UsageError", 2)
    assert said["message"] == "no coordinator is known here"


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, home: Home) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.client.doctor.examine", interrupted)
    assert main(["doctor"]) == 130


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("weft ")


def leaves(group: click.Group, name: str = "weft") -> Iterator[tuple[str, click.Command]]:
    for verb, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{name} {verb}")
        else:
            yield f"{name} {verb}", command


def test_every_command_teaches_with_an_example() -> None:
    without = [name for name, command in leaves(program()) if f"Example: {name}" not in (command.help or "")]
    assert without == []


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join", "--help"]) == 0
    assert "Your data stays on this machine" in capsys.readouterr().out


def test_help_needs_neither_torch_nor_grpc() -> None:
    code = (
        "import sys; from weft.common.cli import build_app; build_app(); "
        "print([name for name in ('torch', 'grpc', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- tokens, addresses, durations --------------------------------------------------------------------------------


def test_a_token_comes_from_the_line_a_file_stdin_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN.text}\n")
    nothing = io.StringIO()
    assert read_token(TOKEN.text.lower(), {}, nothing) == TOKEN
    assert read_token(str(file), {}, nothing) == TOKEN
    assert read_token("-", {}, io.StringIO(f" {TOKEN.text}\n")) == TOKEN
    assert read_token(None, {"WEFT_JOIN_TOKEN": TOKEN.text}, nothing) == TOKEN
    assert read_token(None, {}, nothing) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("h", ("h", 7443)), ("h:1", ("h", 1)), ("[::1]:2", ("::1", 2)), ("[::1]", ("::1", 7443))],
)
def test_address(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected
    assert split_address(join_address(*expected)) == expected


@pytest.mark.parametrize("text", ["", ":1", "h:", "h:x", "h:0", "h:65536", "::1:2", "h:²"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        split_address(text)


def test_ttl() -> None:
    assert [parse_ttl(text) for text in ("90s", "30m", "24h", "7d")] == [90, 1800, 86400, 604800]
    for wrong in ("", "h", "0h", "-1h", "1.5h", "1w", "24"):
        with pytest.raises(UsageError):
            parse_ttl(wrong)


# ---- what is remembered ------------------------------------------------------------------------------------------


def test_home_is_named_by_the_environment(tmp_path: Path) -> None:
    assert Home.of({"WEFT_HOME": str(tmp_path)}).root == tmp_path
    assert Home.of({}).root == Path.home() / ".weft"


def test_a_membership_survives_and_is_private(home: Home) -> None:
    directory = remember(home)
    assert load_member(directory).pin8 == "00010203"
    assert [(path.stat().st_mode & 0o777) for path in (directory, directory / "member.json")] == [
        0o700,
        0o600,
    ]


def test_a_membership_that_others_can_read_is_refused(home: Home) -> None:
    directory = remember(home)
    (directory / "member.json").chmod(0o644)
    with pytest.raises(AccessError):
        load_member(directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"address": 1}', '{"address": "a", "address": "b"}'])
def test_a_damaged_membership_says_what_to_do(home: Home, text: str) -> None:
    directory = remember(home)
    write_private(directory / "member.json", text.encode())
    with pytest.raises(CorruptState) as caught:
        load_member(directory)
    assert "join again" in caught.value.hint


def test_a_viewer_is_found_without_a_flag(home: Home) -> None:
    remember(home)
    remember(home, pin=bytes(32), role=Role.WORKER)
    assert home.find(None).member.address == MEMBER.address
    assert home.find("coord.example.org").local is False


def test_several_coordinators_have_to_be_told_apart(home: Home) -> None:
    remember(home)
    remember(home, pin=bytes(32), address="other:1")
    with pytest.raises(UsageError) as caught:
        home.find(None)
    assert (
        "coord.example.org:7443, " in caught.value.message
        or ", coord.example.org:7443" in caught.value.message
    )
    assert home.find("other:1").member.address == "other:1"


def test_the_operator_needs_no_flag_on_the_coordinators_machine(home: Home, tmp_path: Path) -> None:
    local(home, tmp_path / "state", pid=os.getpid())
    access = home.find(None)
    assert (access.local, access.member.role, access.key_file) == (
        True,
        Role.ADMIN,
        tmp_path / "state/operator.key",
    )


def test_the_operators_own_access_comes_before_a_viewers(home: Home, tmp_path: Path) -> None:
    remember(home)
    local(home, tmp_path / "state", pid=os.getpid())
    assert home.find(None).local is True


def test_a_coordinator_that_was_killed_is_not_found(home: Home, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    local(home, tmp_path / "state", pid=ended.pid)
    assert home.accesses() == ()


def test_a_worker_resumes_with_what_it_was_given(home: Home, tmp_path: Path) -> None:
    directory = remember(home, role=Role.WORKER)
    assert resolve_state(home, None, None, None) == directory
    assert resolve_state(home, None, "coord.example.org:7443", None) == directory
    first = settle(directory, {"data": str(tmp_path), "name": "ada", "threads": 2})
    save_settings(directory, first)
    again = settle(directory, {"data": None, "name": None, "threads": None, "device": "cpu"})
    assert again == WorkerSettings(data=str(tmp_path), name="ada", threads=2, device="cpu")
    assert load_settings(directory) == first


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "there is one"),
        ({"processes": 1}, "there is one"),
        ({"processes": 2, "quantise": "4bit"}, "--quantise 4bit has packed"),
    ],
    ids=["alone", "one process", "4 bits"],
)
def test_a_base_that_cannot_be_divided_is_said_before_joining(
    tmp_path: Path, given: dict[str, str | int | None], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        settle(tmp_path / "state", {"data": str(tmp_path), "shard_base": True, **given})


def test_whether_the_base_is_divided_is_remembered(tmp_path: Path) -> None:
    state = tmp_path / "state"
    given: dict[str, str | int | None] = {"data": str(tmp_path), "processes": 2, "shard_base": True}
    save_settings(state, settle(state, given))
    assert settle(state, {"shard_base": None}).shard_base
    assert not settle(state, {"shard_base": False}).shard_base


def test_paths_are_remembered_absolute(home: Home, tmp_path: Path) -> None:
    assert settle(tmp_path / "state", {"data": "."}).data == str(tmp_path)


def test_data_that_has_gone_is_said_before_anything_else(home: Home, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        settle(tmp_path / "state", {"data": "gone"})


def test_two_workers_of_one_machine_are_told_apart(home: Home) -> None:
    remember(home, role=Role.WORKER)
    remember(home, role=Role.WORKER, pin=bytes(32), address="other:1")
    with pytest.raises(UsageError) as caught:
        resolve_state(home, None, None, None)
    assert "other:1" in caught.value.message


def test_one_process_works_with_a_state_at_a_time(tmp_path: Path) -> None:
    from weft.client.join import alone

    with alone(tmp_path / "state"):
        with pytest.raises(StateLocked) as caught:
            alone(tmp_path / "state")
        assert "--state DIR" in caught.value.hint
    alone(tmp_path / "state").close()
