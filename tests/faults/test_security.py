"""Nothing that is loaded is executed or leads elsewhere, run names are safe, and no secret is written or printed."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmjax
from llmjax import names, reading, redact
from llmjax import run as runs
from llmjax.commands.train import acceptable
from llmjax.data.dataset import Text
from llmjax.data.tokenizer import Bytes, load
from llmjax.errors import DATA, USAGE, Refused
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import Run, differences, from_json, to_json
from llmjax.rundir import find, own
from llmjax.train.loss import NextToken
from llmjax.train.records import read as read_records
from meshes import local

ROOT = Path(llmjax.__path__[0])
LIMIT = 200  # seconds for any command
SECRET, PASSWORD, TOKEN, KEY = "hf_0123456789abcdef", "hunter2_hunter2", "tok-98765", "sk-live-424242424242"
EXPERIMENT = """
import dataclasses
from llmjax.data.dataset import Text
from llmjax.data.tokenizer import Bytes
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import Run
from llmjax.train.loss import NextToken
from meshes import local

@dataclasses.dataclass(frozen=True)
class Remote(Text):
    url: str = ""
    key: str = dataclasses.field(default="", metadata={{"secret": True}})

    def open(self, sequence, cache, say=print):
        say(f"reading {{self.url}} with {{self.key}}")
        if self.url.endswith("#broken"):
            raise RuntimeError(f"{{self.url}} said no to {{self.key}}")
        return super().open(sequence, cache, say)

run = Run(
    model=Llama(vocab=260, layers=1, width=16, heads=2, kv_heads=2, head_dim=8, ff=32, positions=16),
    data=Remote(path="corpus", tokenizer=Bytes(), heldout=0.2, url="https://me:{password}@host/x?token={token}"),
    optimizer=AdamW(), loss=NextToken(), mesh=local.cluster, prompts=("a quick {secret}",),
    steps=8, batch=8, sequence=16, dtype="float32", save_every=4,
)
"""
MODEL = Llama(vocab=260, layers=1, width=16, heads=2, kv_heads=2, head_dim=8, ff=32, positions=16)
RUN = Run(MODEL, Text(path="corpus", tokenizer=Bytes()), AdamW(), NextToken(), local.cluster, name="it", steps=8)


def command(folder: Path, *words: str, module=("-m", "llmjax.cli"), **environment: str):
    return subprocess.run(
        [sys.executable, *module, *words], cwd=folder, env=os.environ | environment, capture_output=True, text=True,
        timeout=LIMIT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a corpus, an experiment that holds secrets, and its run; and all that was printed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus").mkdir()
    for number in range(8):
        (folder / "corpus" / f"{number}.txt").write_text(f"{number} the quick brown fox jumps over it\n" * 40)
    experiment = EXPERIMENT.format(password=PASSWORD, token=TOKEN, secret=SECRET)
    (folder / "remote.py").write_text(experiment)
    done = command(folder, "train", "remote.py", "--data.key", KEY, HF_TOKEN=SECRET)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


NAMES = ["../../x", "..", ".", "/etc/x", "a/b", "a/", "a\\b", "x" * 300, "a b", " ", "a\0b", "a\nb", "-rf", ".hidden",
         "..x", "naïve", "a:b", "~", "$HOME", "a.", "con", "NUL.txt", "com1", "", "*", "‮abc"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_F2_a_name_that_is_no_folder_inside_runs_is_refused_in_one_line(name):
    with pytest.raises(Refused, match=r"\Aname is [^\n]*: give --name [^\n]*\.\Z") as refused:
        acceptable(dataclasses.replace(RUN, name=name))
    assert refused.value.code == USAGE and len(str(refused.value)) < 250


@pytest.mark.parametrize("name", ["a", "stdlib_tiny", "llama3-8b.v2", "2026-01-01", "X" * 100])
def test_F2_ordinary_names_and_any_folder_for_runs_are_accepted(name):
    acceptable(dataclasses.replace(RUN, name=name))
    for folder in ("/tmp/a b/ü", "../x", "~", ""):
        acceptable(dataclasses.replace(RUN, runs=folder))


@pytest.mark.parametrize("name", ["../../x", "x" * 300, "a b", ".hidden"])
def test_F2_a_refused_name_writes_nothing(tmp_path, name):
    done = command(tmp_path, "train", "stdlib_tiny", "--name", name)
    assert done.returncode == USAGE and "name is" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../x", "x" * 5000, "a\0b", "", "no such run"], ids=ascii)
def test_F2_a_run_that_cannot_be_found_is_refused(tmp_path, name):
    with pytest.raises(Refused, match="there is no run") as refused:
        find(name, str(tmp_path))
    assert refused.value.code == USAGE


def test_F1_the_library_calls_nothing_that_executes_what_it_reads():
    banned_modules = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
    banned_calls = {"eval", "exec", "compile", "__import__"}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert not {name.split(".")[0] for name in named} & banned_modules, path
                taken = [name.name for name in node.names] if isinstance(node, ast.ImportFrom) else []
                assert "load" not in taken or named[0].split(".")[0] not in ("numpy", "torch"), path
            if isinstance(node, ast.Call):
                assert not (isinstance(node.func, ast.Name) and node.func.id in banned_calls), (path, node.lineno)
                called = ast.unparse(node.func)
                assert called not in ("os.system", "os.popen"), (path, node.lineno)
                reads = called.startswith(("np.", "numpy.", "jnp.", "torch.")) and called.endswith(".load")
                assert not reads, (path, node.lineno)
                allowed = [word for word in node.keywords if word.arg in ("allow_pickle", "shell")]
                assert not allowed, (path, node.lineno)


@pytest.mark.parametrize(
    "name",
    ["evil:Model", "runs.it.evil:Model", "antigravity:fly", "this:s", "llmjax_file_evil:Model", "llmjax/../evil:Model",
     "llmjax.commands.train:os.system", "subprocess:Popen", "builtins:exec", ".evil:Model", "", "evil"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["class", "function"])
def test_F1_a_run_json_imports_no_module_that_was_not_made_for_llmjax(tmp_path, monkeypatch, name, kind):
    (tmp_path / "runs" / "it").mkdir(parents=True)
    for path in (tmp_path / "evil.py", tmp_path / "runs" / "it" / "evil.py"):
        path.write_text("open('executed', 'w').close()\nclass Model: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    value = {"is": name} if kind == "class" else {"is": "function", "name": name}
    (tmp_path / "run.json").write_text(json.dumps(to_json(RUN) | {"model": value}))
    with pytest.raises(Refused, match=r"run.json names") as refused:
        runs.read(tmp_path / "run.json")
    assert refused.value.code == DATA and not (tmp_path / "executed").exists()
    assert not {module for module in set(sys.modules) - before if "evil" in module or module in ("antigravity", "this")}


def test_F1_classes_of_an_installed_package_that_requires_llmjax_are_imported(tmp_path, monkeypatch):
    (tmp_path / "mymodels").mkdir()
    code = "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Net:\n    width: int = 3\n"
    (tmp_path / "mymodels" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Refused, match="no installed package that requires llmjax"):
        from_json({"is": "mymodels:Net", "width": 5})
    (tmp_path / "mymodels-1.dist-info").mkdir()
    facts = "Metadata-Version: 2.1\nName: mymodels\nVersion: 1\nRequires-Dist: llmjax>=0.1\n"
    (tmp_path / "mymodels-1.dist-info" / "METADATA").write_text(facts)
    assert from_json({"is": "mymodels:Net", "width": 5}).width == 5


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff", b"{", b"NaN", b'"x"'])
def test_F1_deep_torn_and_foreign_json_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text)
    (tmp_path / "tokenizer.json").write_bytes(text)
    for read, name in ((runs.read, "run.json"), (load, "tokenizer.json")):
        with pytest.raises(Refused, match=name) as refused:
            read(tmp_path / name)
        assert refused.value.code == DATA and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("path", "value"),
    [("steps", "x"), ("steps", True), ("sequence", None), ("batch", {"a": 1}), ("prompts", 3), ("prompts", [1]),
     ("dtype", "q"), ("model", 3), ("optimizer", None), ("data", []), ("loss", "x"), ("mesh", None), ("clip", "1"),
     ("layout", {"is": "llmjax.run:Guard"}), ("guard", {"skip": [1]}), ("model.layers", "x"), ("mesh.chips", 1.5)],
)  # fmt: skip
def test_F1_a_run_json_with_values_of_other_types_is_refused_and_names_the_field(tmp_path, path, value):
    written = inner = json.loads(json.dumps(to_json(RUN)))
    *outer, last = path.split(".")
    for name in outer:
        inner = inner[name]
    inner[last] = value
    (tmp_path / "run.json").write_text(json.dumps(written))
    with pytest.raises(Refused, match=f"run.json has .* for .*{last}.*: restore the file") as refused:
        runs.read(tmp_path / "run.json")
    assert refused.value.code == DATA


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("line", [b"[" * 100_000, b"{}", b"[]", b"\xff", b'{"step": "1", "kind": 1}', b'{"step"'])
def test_F1_records_that_are_none_are_refused_by_file_and_line(tmp_path, name, line):
    whole = b'{"kind": "save", "step": 1}\n'
    (tmp_path / name).write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(Refused, match=f"{name}, line 2, is damaged") as refused:
        read_records(tmp_path / name)
    assert refused.value.code == DATA
    (tmp_path / name).write_bytes(whole + line)
    assert read_records(tmp_path / name) == [{"kind": "save", "step": 1}]


def test_F1_a_file_larger_than_any_a_pipe_and_a_link_are_not_read(tmp_path):
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(10**13)  # a hole, which takes no room
    with pytest.raises(Refused, match="larger than") as refused:
        runs.read(tmp_path / "run.json")
    assert refused.value.code == DATA
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(10**13)
    with pytest.raises(Refused, match="larger than"):
        load(tmp_path / "tokenizer.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(Refused, match="no file"):
        runs.read(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(Refused, match="cannot be read"):
        runs.read(tmp_path / "link.json")


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl.new", "lock", "env.json", "tb", "samples/8.json"])
def test_F1_a_run_directory_with_a_link_in_it_is_refused_and_what_it_means_is_untouched(tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    folder = tmp_path / "runs" / "it"
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(to_json(RUN)))
    own(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(Refused, match=f"{name} is a symbolic link") as refused:
        find("it", str(tmp_path / "runs"))
    assert refused.value.code == DATA
    (tmp_path / "it.py").write_text(EXPERIMENT.format(password="p", token="t", secret="s"))
    assert elsewhere.read_text() == "mine"


def test_F1_a_link_for_the_checkpoints_alone_is_allowed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "checkpoints").symlink_to(tmp_path / "disk")
    own(tmp_path / "it")
    assert reading.links(tmp_path / "it") == "checkpoints"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("https://me:pa55word@host/x", "https://***@host/x"),
        ("https://ghp_abc@github.com/x", "https://***@github.com/x"),
        ("gs://bucket/x?token=abc&b=1", "gs://bucket/x?token=***&b=1"),
        ("https://h/x?a=1&X-Amz-Signature=ab12&api_key=7#f", "https://h/x?a=1&X-Amz-Signature=***&api_key=***#f"),
        ("https://host/a@b?tokens_per_s=3", "https://host/a@b?tokens_per_s=***"),
        ("me@host.org, 3 * 4, monkey=1", "me@host.org, 3 * 4, monkey=1"),
    ],
)
def test_F3_users_passwords_and_tokens_of_urls_are_stars(given, written):
    assert redact.urls(given) == written and redact.text(f"see {given!r}.") == f"see {written!r}."


def test_F3_variables_are_known_by_their_names(monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "WANDB_APIKEY", "DB_PASSWORD", "MY_PWD", "KEY"):
        monkeypatch.setenv(name, SECRET)
        assert redact.text(f"a {SECRET} b") == "a *** b"
        monkeypatch.delenv(name)
    for name in ("PWD", "KEYBOARD", "MONKEYS", "PATH_TO", "LANGUAGE_X"):
        monkeypatch.setenv(name, SECRET)
        assert name == "PWD" or redact.text(SECRET) == SECRET
        monkeypatch.delenv(name)


@pytest.mark.parametrize("show", [str, repr, json.dumps, lambda key: str(KeyError(key)), lambda key: str([key])])
def test_F3_a_key_of_several_lines_is_known_however_python_or_json_shows_it(monkeypatch, show):
    key = "-----BEGIN KEY-----\nab'cd\"ef\\gh\u00e9\n-----END-----"
    monkeypatch.setenv("MY_PRIVATE_KEY", key)
    shown = redact.text(f"a {show(key)} b")
    assert "***" in shown and not any(part in shown for part in ("BEGIN", "ab", "cd", "ef", "gh", "END"))


def test_F3_a_text_with_stars_fits_what_it_was_made_of_and_is_compared_at_once():
    for pattern, value, same in [
        ("***", "any", True),
        ("a***b***c", "a1b2c", True),
        ("a***b***c", "abc", True),
        ("a***b***c", "acb", False),
        ("ab***ba", "aba", False),
        ("a***a***a", "aa", False),
        ("***a" * 60 + "b", "a" * 5000, False),  # a run.json from elsewhere may hold this
    ]:
        assert (differences({"x": pattern}, {"x": value}) == []) is same, pattern
        assert (differences({"x": value}, {"x": pattern}) == []) is same, pattern


def hits(text: str) -> list[str]:
    return [secret for secret in (SECRET, PASSWORD, TOKEN, KEY) if secret in text]


def test_F3_no_secret_is_in_the_run_directory_or_the_output(trained):
    folder, said = trained
    assert not hits(said) and "reading https://***@host/x?token=*** with ***" in said
    read = 0
    for path in (folder / "runs").rglob("*"):
        if path.is_file():
            read += 1
            content = path.read_bytes()
            assert not [s for s in (SECRET, PASSWORD, TOKEN, KEY) if s.encode() in content], path
    assert read > 20
    written = json.loads((folder / "runs" / "remote" / "run.json").read_text())
    assert written["data"]["key"] == "***" and written["data"]["url"] == "https://***@host/x?token=***"


def test_F3_the_run_goes_on_with_the_secret_given_again_and_another_secret_is_no_other_config(trained):
    folder, _ = trained
    (folder / "runs" / "remote" / "events.jsonl").write_text("")  # as if it had not finished
    for key, environment in ((KEY, {"HF_TOKEN": SECRET}), ("another-key-8888", {})):
        done = command(folder, "train", "remote.py", "--data.key", key, **environment)
        assert done.returncode == 0 and not hits(done.stderr) and key not in done.stdout, done.stderr


def test_F3_a_run_json_without_its_secret_is_refused_by_the_field_to_give_again(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_json(dataclasses.replace(RUN, runs="https://me:pa55word@host"))))
    with pytest.raises(Refused, match=r"runs has \*\*\* in place of a secret.*: give it with --runs") as refused:
        acceptable(runs.read(path))
    assert refused.value.code == USAGE
    acceptable(dataclasses.replace(runs.read(path), runs="https://me:pa55word@host"))


@pytest.mark.parametrize("how", ["traceback", "refusal", "usage"])
def test_F3_no_secret_is_in_a_traceback_a_refusal_or_the_help(trained, how):
    folder, _ = trained
    url = f"https://me:{PASSWORD}@host/x?token={TOKEN}"
    words = {
        "traceback": ("--data.url", f"{url}#broken"),
        "refusal": ("--data.path", f"{url}&key={SECRET}"),
        "usage": ("--help",),
    }[how]
    done = command(folder, "train", "remote.py", "--data.key", KEY, "--name", "other", *words, HF_TOKEN=SECRET)
    assert done.returncode == {"traceback": 1, "refusal": DATA, "usage": 0}[how], done.stderr
    assert not hits(done.stdout + done.stderr) and "***" in done.stdout + done.stderr
    assert how != "traceback" or "RuntimeError: https://***@host/x?token=***#broken said no to ***" in done.stderr


def test_F3_no_part_of_a_long_secret_is_in_the_columns_of_a_help(tmp_path):
    key, password = "sk-" + "abcdefghij" * 15, "hunter2" * 12
    experiment = EXPERIMENT.format(password=password, token=TOKEN, secret=key)
    (tmp_path / "remote.py").write_text(experiment.replace("heldout=0.2,", f"heldout=0.2, key={key!r},"))
    done = command(tmp_path, "train", "remote.py", "--help", COLUMNS="60", MY_API_KEY=key)
    assert done.returncode == 0 and "--data.key" in done.stdout and "***" in done.stdout
    assert not any(part in done.stdout for part in ("abcde", "hunter", "unter2h", TOKEN[:6]))


def test_F3_the_fingerprint_of_a_run_depends_on_no_secret_and_not_on_the_environment(monkeypatch):
    runs_ = [dataclasses.replace(RUN, data=Text(path=f"s3://a:{p}@b/x", tokenizer=Bytes())) for p in ("one1", "two2")]
    before = [runs.fingerprint(run) for run in (*runs_, RUN)]
    monkeypatch.setenv("HF_TOKEN", "corpus")
    assert [runs.fingerprint(run) for run in (*runs_, RUN)] == before and before[0] == before[1] != before[2]
    assert to_json(RUN)["data"]["path"] == "***"
    found = to_json(RUN)
    monkeypatch.delenv("HF_TOKEN")
    assert differences(found, to_json(RUN)) == []
    assert differences(to_json(runs_[0]), to_json(RUN)) == ["data.path"]


WATCHED = """
import json, os, sys
seen = {"open": set(), "other": set()}
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        seen["open"].add(os.path.realpath(os.fsdecode(arguments[0])))
    elif event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "ctypes.dlopen"):
        seen["other"].add(f"{event} {arguments[0]}")
    elif event == "import" and arguments[0] == "evil":
        seen["other"].add("import evil")
import atexit
def write():
    with os.fdopen(os.open(os.environ["WATCHED"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
        json.dump({name: sorted(found) for name, found in seen.items()}, file)
atexit.register(write)
sys.addaudithook(hook)
from llmjax import cli
cli.main()
"""


@pytest.mark.faults
@pytest.mark.parametrize("what", ["train", "generate", "checkpoints"])
def test_F1_a_hostile_run_directory_has_nothing_outside_it_opened_and_nothing_executed(trained, tmp_path, what):
    """The newest checkpoint's manifest, its arrays and the tokenizer all point at a file elsewhere."""
    import shutil

    folder = tmp_path / "place"
    shutil.copytree(trained[0], folder)
    bait = tmp_path / "bait"
    bait.write_text("secret of another")
    (folder / "watched.py").write_text(WATCHED)
    run = folder / "runs" / "remote"
    (run / "events.jsonl").write_text("")
    if what == "generate":  # a class of an experiment's own file can only be had from that file
        written = json.loads((run / "run.json").read_text())
        data = {k: v for k, v in written["data"].items() if k not in ("url", "key")} | {
            "is": "llmjax.data.dataset:Text"
        }
        (run / "run.json").write_text(json.dumps(written | {"data": data}))
    (folder / "evil.py").write_text(f"open({str(bait)!r}, 'w').write('executed')\n")
    words = {
        "train": ("train", "remote.py", "--data.key", KEY),
        "generate": ("generate", "runs/remote", "--tokens", "4"),
        "checkpoints": ("checkpoints", "runs/remote", "--verify"),
    }[what]
    clean = watched(folder, *words)
    from llmjax.checkpoint import manifest

    newest = run / "checkpoints" / "8"
    found = manifest.read(newest)
    outside = manifest.Manifest(found.files | {f"../../../../../{bait.name}": (17, "0" * 64)}, found.facts, 1.0)
    (newest / manifest.NAME).write_bytes(manifest._text(outside))
    step = run / "checkpoints" / "99"
    step.symlink_to(tmp_path)
    (run / "checkpoints" / "98").mkdir()
    (run / "checkpoints" / "98" / "MANIFEST.json").write_text("[" * 100_000)
    (run / "checkpoints" / "97").mkdir()
    (run / "checkpoints" / "97" / "_METADATA").symlink_to(bait)
    hostile = watched(folder, *words)
    assert clean["code"] == 0 and hostile["code"] in (0, DATA), hostile["err"]
    assert "Traceback" not in hostile["err"]
    assert str(bait) not in hostile["open"] and bait.read_text() == "secret of another"
    assert set(hostile["other"]) <= set(clean["other"]), set(hostile["other"]) - set(clean["other"])
    allowed = [os.path.realpath(path) for path in (folder, sys.prefix, sys.base_prefix, ROOT.parent)]
    strange = [
        path
        for path in set(hostile["open"]) - set(clean["open"])
        if not any(path.startswith(f"{home}/") for home in allowed)
        and not path.startswith(("/proc/", "/dev/", "/sys/"))
    ]
    assert not strange


def watched(folder: Path, *words: str) -> dict:
    """A command under an audit hook: what it opened, what it started, its code and stderr."""
    done = command(folder, *words, module=("watched.py",), WATCHED=str(folder.parent / "watched.json"))
    return json.loads((folder.parent / "watched.json").read_text()) | dict(code=done.returncode, err=done.stderr)


def test_F1_names_of_meshes_and_experiments_are_no_paths():
    for name in ("../evil", "os", "__init__", "chips", "a.b", ""):
        with pytest.raises(Refused, match="there is no mesh named"):
            names.load("meshes", name, "cluster")
