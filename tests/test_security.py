"""Nothing from a configuration, a data set, a completion or a checkpoint is run; what could be is on a list."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "drpo_lightning"
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
STARTS = (
    "os.system",
    "os.popen",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "subprocess.",
    "pty.",
    "asyncio.create_subprocess",
)
UNPICKLES = (
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "dill.load",
    "cloudpickle.load", "cloudpickle.loads", "joblib.load", "yaml.load", "yaml.unsafe_load", "numpy.load", "np.load",
)  # fmt: skip
COLLECTIVES = ("_object", "_object_list")
"""Ends of the names of collectives that pickle what they send."""
IMPORTS = ("importlib.import_module", "import_module", "runpy.run_module", "runpy.run_path")
RANKS = "of the run's own ranks, which must be on a private network: SECURITY.md"
ALLOWED = {
    ("hints.py", "import_module"): "a class that the configuration names, which is code",
    ("callbacks/rewards.py", "importlib.import_module"): "a function that the configuration names, which is code",
    ("export.py", "pickle.Unpickler"): "the base of a reader with a list of permitted classes",
    (
        "rewards/isolation_worker.py",
        "pickle.loads",
    ): "in the worker, of what the trainer has sent over their own socket",
    (
        "rollout/served.py",
        "connection.recv",
    ): "in the engine's process, of what the trainer has sent over their own pipe",
    ("rollout/process.py", "self._connection.recv"): "of the engine's process, this package's, over their own pipe",
    ("__main__.py", "import_module"): "a module of this package, by a table of commands",
    ("completion.py", "subprocess.run"): "this package's own help, by a table of commands, without a shell",
    ("doctor.py", "subprocess.run"): "a fixed command of the interpreter, without a shell",
    ("serve.py", "os.execve"): "becomes vLLM's server; a list of words that the command line gives, without a shell",
    ("rollout/ranks.py", "dist.broadcast_object_list"): RANKS,
    ("rollout/ranks.py", "dist.all_gather_object"): RANKS,
    ("rollout/node.py", "dist.scatter_object_list"): RANKS,
    ("rollout/node.py", "dist.gather_object"): RANKS,
    ("rollout/node.py", "dist.all_gather_object"): RANKS,
    ("ranks.py", "torch.distributed.all_gather_object"): RANKS,
    ("rewards/code_execution.py", "subprocess.run"): "a fixed command, without a shell, in a process that is confined",
    (
        "rewards/code_execution.py",
        "subprocess.Popen",
    ): "a fixed command, without a shell, in a process that is confined",
}
"""Calls that are made, by file, each with what keeps it from running what is not trusted."""


def calls(file):
    """Dotted names of everything that a file calls or derives from, with the node."""
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node
        elif isinstance(node, ast.ClassDef):
            yield from ((ast.unparse(base), node) for base in node.bases)


def is_dangerous(name):
    is_pipe = name.lower().endswith("connection.recv")  # of `multiprocessing`, which unpickles
    is_collective = name.startswith(("dist.", "torch.distributed.", "distributed.")) and name.endswith(COLLECTIVES)
    return name in {*RUNS_CODE, *UNPICKLES, *IMPORTS} or name.startswith(STARTS) or is_pipe or is_collective


def is_literal(node):
    """True for a text that stands in the source; names of modules' own constants are in capitals."""
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id.isupper())


def offences(file):
    for name, node in calls(file):
        if is_dangerous(name) and (file, name) not in ALLOWED:
            yield f"{file}:{node.lineno} {name}"
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if keywords.get("shell", "False") != "False":
            yield f"{file}:{node.lineno} {name} with a shell"
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield f"{file}:{node.lineno} torch.load without weights_only=True"
        method = node.func
        if (
            isinstance(method, ast.Attribute)
            and method.attr in ("format", "format_map")
            and not is_literal(method.value)
        ):
            yield f"{file}:{node.lineno} a format string that is not in the source"


@pytest.mark.parametrize("file", FILES)
def test_nothing_that_is_not_trusted_is_run_or_unpickled_or_taken_as_a_format(file):
    assert not list(offences(file))


def test_every_exception_is_still_needed():
    made = {(file, name) for file in FILES for name, _ in calls(file)}
    assert ALLOWED.keys() <= made


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "subprocess.run([x])",
        "run(x, shell=yes)",
        "pickle.loads(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "x.format(1)",
        "texts[0].format_map(x)",
        "class Reader(pickle.Unpickler): pass",
        "dist.all_gather_object(values, value)",
        "self._connection.recv()",
    ],
)
def test_it_would_be_found(code, monkeypatch, tmp_path):
    (tmp_path / "code.py").write_text(code)
    monkeypatch.setitem(FILES, "code.py", tmp_path / "code.py")
    assert list(offences("code.py"))


@pytest.mark.parametrize(
    "code", ["'{}'.format(x)", "NAMES.format(x)", "torch.load(x, weights_only=True)", "json.loads(x)"]
)
def test_what_is_harmless_is_not(code, monkeypatch, tmp_path):
    (tmp_path / "code.py").write_text(code)
    monkeypatch.setitem(FILES, "code.py", tmp_path / "code.py")
    assert not list(offences("code.py"))
