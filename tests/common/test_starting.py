"""Starting: what is imported before the first step, the fork server, names of this machine, processes of multiprocessing's."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from common import names, warm
from common.children import SERVER_GONE, Process, in_words
from tests.common.helpers import end_group, python, run, start, until

pytestmark = pytest.mark.launch  # it starts processes and waits for them
linux = pytest.mark.only_on("linux")

# ------------------------------------------------------------------------------------------- without the compiler

STEP = """
import sys, torch
if {lean}:
    from common.lean import spare_the_compiler
    spare_the_compiler()
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def steps(kind, model, count=3):
    options = {{"lr": 0.1}} | ({{"momentum": 0.9}} if kind == "SGD" else {{}})
    optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
    for number in range(count):
        optimizer.zero_grad()
        x = torch.linspace(-1, 1, 24).reshape(4, 6) * (1 + number)
        torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
    return optimizer

def net():
    torch.manual_seed(1)
    return torch.nn.Linear(6, 2)

def real():
    return "torch._dynamo.eval_frame" in sys.modules
"""


def torch_python(code, *arguments, lean=True):
    status, out, err = python(STEP.format(lean=lean) + code, *arguments, limit=120)
    assert status == 0, err
    return out


JOIN = """
rank, world_size = map(int, sys.argv[2:])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], world_size), rank=rank, world_size=world_size)
steps("SGD", DistributedDataParallel(net(), gradient_as_bucket_view=True))
print(real())
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world_size", (1, 2))
def test_a_ddp_step_imports_no_compiler(tmp_path, world_size):
    words = [sys.executable, "-c", STEP.format(lean=True) + JOIN, str(tmp_path / "store")]
    ranks = [start([*words, str(rank), str(world_size)]) for rank in range(world_size)]
    try:
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            end_group(rank)
    assert [out for out, _ in said] == ["False\n"] * world_size, said


def test_what_else_is_asked_of_the_compiler_it_answers_itself():
    """Also after an optimizer has stepped, which has asked the stand-in; and under the names that were imported from it."""
    out = torch_python(
        "optimizer = steps('SGD', net())\n"
        "print(real())\n"
        "import torch._dynamo as kept\n"
        "model = net()\n"
        "calls = []\n"
        "compiled = torch.compile(lambda x: calls.append(1) or model(x), backend='eager')\n"
        "x = torch.ones(3, 6)\n"
        "print(torch.equal(compiled(x), model(x)), real())\n"
        "steps('SGD', torch.compile(model, backend='eager'))\n"
        "optimizer.step()\n"
        "print(kept.config is sys.modules['torch._dynamo'].config, torch._dynamo is sys.modules['torch._dynamo'])\n"
        "print(type(sys.modules['torch._dynamo']).__name__)\n"
    )
    assert out.splitlines() == ["False", "True True", "True True", "module"]


def test_the_real_one_stays_where_it_is_there_already():
    out = torch_python(
        "import torch._dynamo\nbefore = torch._dynamo\nfrom common.lean import spare_the_compiler\nspare_the_compiler()\n"
        "print(torch._dynamo is before is sys.modules['torch._dynamo'])\n",
        lean=False,
    )
    assert out == "True\n"


def test_every_optimizer_computes_the_same_bits_without_it():
    code = (
        "for kind in ('SGD', 'Adam', 'AdamW'):\n"
        "    model = net()\n"
        "    steps(kind, model, 5)\n"
        "    print(kind, torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes().hex())\n"
        "print(real(), file=sys.stderr)\n"
    )
    with_it, without = torch_python(code, lean=False), torch_python(code)
    assert with_it == without and len(set(without.split())) == 6


# ------------------------------------------------------------------------------------------------------------ names


class Glibc:
    """Notes what it is asked to look names up in."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        assert name == "__nss_configure_lookup"
        return lambda database, service: self.asked.append((database, service))


def test_names_come_from_files_only_and_then_as_configured(monkeypatch):
    glibc = Glibc()
    monkeypatch.setattr(names.ctypes, "CDLL", lambda name: glibc)
    monkeypatch.setattr(names.sys, "platform", "linux")
    monkeypatch.setattr(names, "_configured", lambda: "files mdns dns")
    names.from_files_only()
    assert glibc.asked == [(b"hosts", b"files")]
    names.as_configured()
    assert glibc.asked == [(b"hosts", b"files"), (b"hosts", b"files mdns dns")]


@pytest.mark.parametrize("platform, library", [("darwin", None), ("linux", object())])
def test_names_are_left_alone_where_glibc_is_not_there(monkeypatch, platform, library):
    monkeypatch.setattr(names.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(names.sys, "platform", platform)
    names.from_files_only()
    names.as_configured()


@pytest.mark.parametrize(
    "text, configured",
    [
        ("passwd: files\nhosts: files mdns4_minimal [NOTFOUND=return] dns\n", "files mdns4_minimal [NOTFOUND=return] dns"),
        ("# hosts: nis\nhosts:\tdns files # comment\n", "dns files"),
        ("passwd: files\n", "files dns"),
        (None, "files dns"),
    ],
)
def test_what_nsswitch_says_about_hosts(monkeypatch, tmp_path, text, configured):
    file = tmp_path / "nsswitch.conf"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(names, "Path", lambda path: file if path == "/etc/nsswitch.conf" else pytest.fail(path))
    assert names._configured() == configured


@linux
def test_names_can_be_looked_up_either_way():
    code = (
        "import socket\nfrom common import names\nnames.from_files_only()\nprint(socket.gethostbyname('localhost'))\n"
        "names.as_configured()\nprint(socket.gethostbyname('localhost'))\n"
    )
    assert python(code)[:2] == (0, "127.0.0.1\n127.0.0.1\n")


# ------------------------------------------------------------------------------------------------------- fork server


@pytest.mark.parametrize(
    "platform, cuda, offered, method",
    [
        ("linux", None, ["fork", "spawn", "forkserver"], "forkserver"),
        ("linux", False, ["fork", "spawn", "forkserver"], "forkserver"),
        ("linux", True, ["fork", "spawn", "forkserver"], "spawn"),
        ("linux", None, ["fork", "spawn"], "spawn"),
        ("darwin", None, ["spawn", "fork", "forkserver"], "spawn"),
        ("win32", None, ["spawn"], "spawn"),
    ],
)
def test_default_start_method(monkeypatch, platform, cuda, offered, method):
    """``cuda``: torch is imported and has a CUDA context or not; None: it is not imported."""
    torch = None if cuda is None else types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: cuda))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(warm.sys, "platform", platform)
    monkeypatch.setattr(warm.multiprocessing, "get_all_start_methods", lambda: offered)
    assert warm.default_start_method() == method


# A process that starts the server; what it forks tells where it is, what it has and how it takes Ctrl-C.
SERVED = """
import multiprocessing, os, signal, sys, time

def look(place):
    mine = [os.getcwd(), "torch" in sys.modules, "common.loop" in sys.modules]
    mine.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    mine.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
    open(place, "w").write(repr(mine))

if __name__ == "__main__":
    from common.command_line import parse_config
    from common.warm import start_server
    start_server(parse_config("served.py", argv=["--job", "random"]))
    print(os.getcwd(), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)
    if sys.argv[1:] == ["wait"]:
        time.sleep(60)
    process = multiprocessing.get_context("forkserver").Process(target=look, args=("seen",))
    process.start()
    process.join()
    print(process.exitcode, sorted({"torch", "numpy"} & set(sys.modules)))
"""


@linux
def test_what_the_server_forks_has_torch_and_its_starter_has_not(tmp_path):
    (tmp_path / "served.py").write_text(SERVED)
    status, out, err = run([sys.executable, "served.py"], cwd=tmp_path, limit=60)
    assert (status, out, err) == (0, f"{tmp_path} False\n0 []\n", "")
    assert (tmp_path / "seen").read_text() == repr([str(tmp_path), True, True, True, False])


def children_of(pid):
    return [int(child) for child in (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()]


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@linux
@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGINT))
def test_the_server_ends_with_its_starter_while_it_still_imports(tmp_path, number):
    (tmp_path / "served.py").write_text(SERVED)
    child = start([sys.executable, "served.py", "wait"], cwd=tmp_path)
    try:
        assert child.stdout.readline()
        served = children_of(child.pid)  # the resource tracker and the server
        assert len(served) == 2
        time.sleep(0.3)  # it imports torch by now, which takes longer
        os.killpg(child.pid, number) if number == signal.SIGINT else child.kill()
        child.wait(5)
        assert until(lambda: not any(map(alive, served)), 2.0)
        err = child.stderr.read()
    finally:
        end_group(child)
    assert "preloaded" not in err and "forkserver" not in err, err


# ------------------------------------------------------------------------------------- processes of multiprocessing's


@contextlib.contextmanager
def process(method, target, *arguments):
    made = multiprocessing.get_context(method).Process(target=target, args=arguments)
    made.start()
    try:
        yield Process(made)
    finally:
        made.kill()
        made.join(10)


@pytest.mark.parametrize("method", ("spawn", "fork"))
def test_a_process_ends_with_its_status(method):
    with process(method, sys.exit, 3) as child:
        assert child.wait(30) == child.poll() == 3
        child.send_signal(signal.SIGTERM)  # nothing to send it to any more, and no error


def test_a_process_that_runs():
    with process("fork", time.sleep, 60) as child:
        assert child.poll() is None
        began = time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.1)
        assert 0.1 <= time.monotonic() - began < 5
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == child.poll() == -signal.SIGTERM


def test_the_status_of_a_rank_whose_server_is_gone_is_explained():
    assert in_words(SERVER_GONE).startswith("exit status 255 (") and "fork server" in in_words(SERVER_GONE)
