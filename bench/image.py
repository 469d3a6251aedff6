"""Builds the image of deploy/Dockerfile and runs it, without Docker, for bench/image.md.

    apt-get install buildah crun debootstrap curl
    python -m bench.image --work runs/image [--publish]

Needs Linux, root, the network for Debian's and Python's packages, and some minutes. The base image is made with
debootstrap where WORK has none; images and containers lie in WORK, so those of this machine stay as they are. `buildah`
builds the Dockerfile as it is. `crun` runs the image with what `docker run --read-only --cap-drop ALL --tmpfs /tmp`
asks for: as the user of the image, with two volumes, in namespaces of its own. Docker's filter of system calls and its
masked files of /proc are not tried. The network is one of the namespaces: no other machine reaches the server, and the
client from outside enters it.

A mirror of the package index and its authority are mounted while the image is built. Of them only the empty files and
folders on which they were mounted stay in its first stages:

    python -m bench.image --work runs/image --mount /etc/pip.conf:/etc/pip.conf --mount mirror.pem:/run/mirror.pem
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bench.publish import ROOT, Page, publish_option

MOST_MB = 400
TOOLS = ("buildah", "crun", "curl", "debootstrap", "nsenter", "unshare")
DOCKERFILE = ROOT / "deploy/Dockerfile"
IMAGE = "jaxrec:latest"
SETTINGS = ("JAXREC_ALLOW_INSECURE=true", "JAXREC_HTTP=0.0.0.0:8080")
CONTAINER = f"jaxrec-image-bench-{os.getpid()}"
# crun does not know how to read every kind of control groups, and needs none here: it finds an empty folder.
RUNTIME = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "sh", "crun"]
RUNTIME += ["--cgroup-manager=disabled"]  # and --root: `runtime_of`
START_S = 60
STOP_S = 30
BUILD_S = 3600
COMMAND_S = 900
# What Debian's slim image leaves out, too, and what `apt-get update` brings again.
NOT_IN_SLIM = (
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/lib/apt/lists",
)

STORE = "/store/events.sqlite"
HTTP = ["curl", "--silent", "localhost:8080/jaxrec.v1.Recommender/Recommend"]
HTTP += ["--header", "content-type: application/json", "--data", '{"userId": "u1", "k": 2}']

RECORD = """
from serve.client import RecommenderClient, UserEvent
with RecommenderClient("127.0.0.1:50051") as client:
    client.record_events([UserEvent(event_id="e1", user_id="u1", item_id="1", rating=5.0, timestamp=1_700_000_000)])
    print(len(client.recommend(user_id="u1", k=3).recommendations), "items for u1")
"""

HOLD = """
import sqlite3, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
from serve.client import RecommenderClient, UserEvent
event = UserEvent(event_id="e2", user_id="u1", item_id="2", timestamp=1_700_000_001)
with RecommenderClient("127.0.0.1:50051") as client, ThreadPoolExecutor(1) as other:
    store = sqlite3.connect(sys.argv[1], isolation_level=None)
    store.execute("BEGIN IMMEDIATE")  # whoever records an event waits
    held = other.submit(client.record_events, [event])
    client.get_model_info()
    print("a call waits", flush=True)
    try:
        while True:
            client.get_model_info()
    except grpc.RpcError as error:
        print("a new call:", error.code().name, error.details())
    waits = not held.done()
    store.execute("ROLLBACK")
    held.result()
    print("the call that waited is answered" if waits else "no call waited")
"""


@click.command()
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Base, image and logs.")
@click.option("--mount", "mounts", multiple=True, metavar="FILE:PLACE", help="Mounted while the image is built.")
@publish_option
def main(work: Path, mounts: tuple[str, ...], publish: bool) -> None:
    """Builds the image, runs it and writes the page. Exits with 1 if a check fails."""
    require_tools()
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    page = Page("image", "Image", publish, work)
    buildah = Buildah(work)
    base = base_name(DOCKERFILE.read_text("utf-8"))
    if not buildah.has(base):
        make_base(buildah, base, work)
    log = buildah.build(mounts)
    layers = buildah.layers()
    transcript = Transcript()
    with buildah.mounted(IMAGE) as root:
        try_image(buildah, root, work, transcript)
    total = sum(layers) / 1e6
    if total > MOST_MB:
        transcript.failures.append(f"the image has {total:.0f} MB, at most {MOST_MB}")
    page.write(
        [
            f"The image has {total:.0f} MB (10^6 bytes, not compressed); the goal is at most {MOST_MB}: "
            f"{'missed' if total > MOST_MB else 'met'}. Its layers, from the base on, have "
            f"{', '.join(f'{one / 1e6:.0f}' for one in layers)} MB. The base is `{base}` of the work folder, "
            "where debootstrap makes it if it is missing.",
            "",
            f"Tools: {', '.join(versions())}.",
            "",
            "## Build",
            "",
            "```text",
            *steps(log),
            "```",
            "",
            "## Run",
            "",
            "The root is read-only, and no capability is left. Docker's filter of system calls is not there. `/tmp` is"
            " in memory, `/models` a model directory with random weights that cannot be written, and `/store` an empty"
            " folder of the user 10001. `outside $` marks what ran outside of the image, in the network of the server.",
            "",
            "```text",
            *transcript.lines,
            "```",
            "",
            *([f"- failed: {one}" for one in transcript.failures] or ["All checks passed."]),
        ]
    )
    if transcript.failures:
        raise click.ClickException("; ".join(transcript.failures))


def require_tools() -> None:
    """Raises click.ClickException where this machine cannot build an image."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        raise click.ClickException(
            f"{', '.join(missing)} missing: apt-get install buildah crun curl debootstrap util-linux"
        )
    if os.geteuid() != 0:
        raise click.ClickException("debootstrap and mounting an image need root")


def versions() -> Iterator[str]:
    for name in ("buildah", "crun"):
        found = re.search(r"version (\S+)", output([name, "--version"]))
        yield f"{name} {found[1] if found else 'of an unknown version'}"
    yield output(["debootstrap", "--version"]).strip()


def base_name(dockerfile: str) -> str:
    """The image that a Dockerfile starts from by default."""
    found = re.search(r"^ARG BASE=(\S+)$", dockerfile, re.MULTILINE)
    if found is None:
        raise click.ClickException("expected a line ARG BASE=IMAGE in deploy/Dockerfile")
    return found[1]


def steps(log: str) -> list[str]:
    """The instructions in a log of `buildah build`, and what pip installed, each in one line."""
    wanted = [
        line for line in log.splitlines() if re.match(r"(\[\d/\d\] )?(STEP \d|COMMIT )|Successfully installed", line)
    ]
    return [" ".join(line.split()) for line in wanted]


def runtime_config(image: Mapping[str, Any], root: Path, volumes: Mapping[str, Path]) -> dict[str, Any]:
    """What an OCI runtime runs: the command of an image as its user, with a read-only root and no capability.

    Args:
        image: The configuration of an image, of which `User`, `Env`, `Entrypoint`, `Cmd` and `Volumes` are used.
        root: Folder of its files.
        volumes: By path of a volume: the folder that is mounted there. `/models` cannot be written.

    Raises:
        click.ClickException: The volumes are not those of the image, or its user is root.
    """
    if set(volumes) != set(image["Volumes"]):
        raise click.ClickException(f"the image has the volumes {sorted(image['Volumes'])}, expected {sorted(volumes)}")
    user, group = (int(part) for part in image["User"].split(":"))
    if user == 0:
        raise click.ClickException("the user of the image is root")
    mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}]
    mounts += [
        {"destination": place, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", mode]}
        for place, mode in (("/dev", "mode=755"), ("/tmp", "mode=1777"))
    ]
    mounts += [
        {
            "destination": place,
            "type": "bind",
            "source": str(folder),
            "options": ["bind", "ro" if place == "/models" else "rw"],
        }
        for place, folder in volumes.items()
    ]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(root), "readonly": True},
        "process": {
            "user": {"uid": user, "gid": group},
            "args": [*image["Entrypoint"], *image["Cmd"]],
            "env": [*image["Env"], *SETTINGS],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {},
        },
        "mounts": mounts,
        "linux": {"namespaces": [{"type": one} for one in ("pid", "ipc", "uts", "mount", "network")]},
    }


class Transcript:
    """What was run and what came of it, for the page."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failures: list[str] = []

    def run(self, shown: str, command: Sequence[str], *expected: str, status: int = 0) -> None:
        """Runs a command; it has to end with `status` and print all that is `expected`."""
        ended = subprocess.run(command, check=False, text=True, capture_output=True, timeout=COMMAND_S)
        text = ended.stdout + ended.stderr
        self.lines += [
            shown,
            *text.rstrip().splitlines(),
            *([f"exit status {ended.returncode}"] if ended.returncode else []),
            "",
        ]
        if ended.returncode != status or any(one not in text for one in expected):
            self.failures.append(f"{shown}: exit status {ended.returncode}, {text.strip()}")


class Buildah:
    """buildah with the images and containers of a work folder."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._command = ["buildah", "--root", str(work / "storage"), "--runroot", str(work / "run")]

    def __call__(self, *words: str) -> str:
        return output([*self._command, *words]).strip()

    def has(self, image: str) -> bool:
        names = self("images", "--format", "{{.Name}}:{{.Tag}}").splitlines()
        return image in [one.rpartition("/")[2] for one in names]

    def build(self, mounts: Sequence[str]) -> str:
        """Builds deploy/Dockerfile; returns the log, which is in WORK/build.log.

        Docker's format has the health check, OCI's has not.
        """
        volumes = [word for one in mounts for word in ("--volume", f"{one}:ro")]
        files = ["--file", str(DOCKERFILE), "--ignorefile", f"{DOCKERFILE}.dockerignore", "--tag", IMAGE, str(ROOT)]
        options = ["--isolation", "chroot", "--pull-never", "--format", "docker"]
        path = self._work / "build.log"
        with path.open("w", encoding="utf-8") as log:
            ended = subprocess.run(
                [*self._command, "build", *options, *volumes, *files],
                stdout=log,
                stderr=log,
                check=False,
                timeout=BUILD_S,
            )
        text = path.read_text("utf-8")
        if ended.returncode:
            raise click.ClickException("\n".join([f"the build failed ({path}):", *text.splitlines()[-15:]]))
        return text

    def config(self) -> dict[str, Any]:
        """The configuration of the image, as Docker writes it."""
        return dict(json.loads(self("inspect", "--type", "image", IMAGE))["Docker"]["config"])

    def layers(self) -> list[int]:
        """Bytes of each layer of the image, the base first."""
        manifest = json.loads(json.loads(self("inspect", "--type", "image", IMAGE))["Manifest"])
        return [one["size"] for one in manifest["layers"]]

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """The folder of an image's files, in a new container that is removed in the end."""
        container = self("from", "--pull-never", image)
        try:
            yield Path(self("mount", container))
        finally:
            self("umount", container)
            self("rm", container)


def make_base(buildah: Buildah, name: str, work: Path) -> None:
    """Commits Debian's smallest installation, without documentation, as an image."""
    release = name.partition(":")[2].partition("-")[0]
    folder = work / "debian"
    shutil.rmtree(folder, ignore_errors=True)
    click.echo(f"making {name} with debootstrap", err=True)
    output(["debootstrap", "--variant=minbase", release, str(folder)])
    for place in NOT_IN_SLIM:
        for entry in (folder / place).iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(folder), "/")
    buildah("config", "--cmd", "bash", container)
    buildah("commit", "--quiet", container, name)
    buildah("rm", container)
    shutil.rmtree(folder)


def try_image(buildah: Buildah, root: Path, work: Path, transcript: Transcript) -> None:
    """Runs the server of the image twice on one store, and asks it from inside and outside."""
    bundle, model, store = work / "bundle", work / "model", work / "store"
    if not model.exists():
        output([sys.executable, "-m", "bench.make_model", "--items", "1000", "--out", str(model)])
    for folder in (bundle, store):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    image = buildah.config()
    config = runtime_config(image, root, {"/models": model, "/store": store})
    user = config["process"]["user"]
    os.chown(store, user["uid"], user["gid"])
    (bundle / "config.json").write_text(json.dumps(config), "utf-8")
    check = [str(word) for word in image["Healthcheck"]["Test"][1:]]
    with server(bundle, config, transcript) as inside:
        process = ["grep", "--extended-regexp", "Uid|Cap|NoNewPrivs", "/proc/1/status"]
        none_left = [f"{name}:\t{0:016}" for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
        expected = ["\t".join(["Uid:", *4 * [str(user["uid"])]]), *none_left, "NoNewPrivs:\t1"]
        transcript.run(f"$ {shlex.join(process)}", [*inside, *process], *expected)
        for path in ("/file", "/models/file"):
            transcript.run(f"$ touch {path}", [*inside, "touch", path], "Read-only file system", status=1)
        transcript.run(f"$ {shlex.join(check)}", [*inside, *check], "SERVING")
        ask = ["python", "-m", "serve", "ask", "--watched", "1", "--k", "3"]
        transcript.run(f"$ {shlex.join(ask)}", [*inside, *ask], "recommendation ")
        network = ["nsenter", "--net", "--target", state(runtime_of(bundle))["pid"]]
        outside = [*network, sys.executable]
        transcript.run(f"outside $ {shlex.join(ask)}", [*outside, *ask[1:]], "recommendation ")
        transcript.run(f"outside $ {shlex.join(HTTP)}", [*network, *HTTP], '"recommendationId"')
        program = "".join(f"\n{line}" for line in RECORD.strip().splitlines())
        transcript.run(f"outside $ python -c '{program}'", [*outside, "-c", RECORD], "3 items for u1")
        hold = [*outside, "-c", HOLD, str(store / "events.sqlite")]
        held = subprocess.Popen(hold, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert held.stdout is not None
        transcript.lines += [f"outside $ python -c '{HOLD.rstrip()}' STORE", held.stdout.readline().rstrip(), ""]
    rest, _ = held.communicate(timeout=COMMAND_S)
    transcript.lines += ["of the call that waited over SIGTERM:", *rest.splitlines(), ""]
    if "a new call: UNAVAILABLE" not in rest or "the call that waited is answered" not in rest:
        transcript.failures.append(f"a call that waits over SIGTERM: {rest}")
    with server(bundle, config, transcript) as inside:
        events = ["python", "-m", "serve", "ask", "--events", "u1"]
        transcript.run(f"$ {shlex.join(events)}", [*inside, *events], "e1", "e2")
        for words in (["outcomes", STORE], ["log", STORE, "/tmp/log.sqlite"]):
            command = ["python", "-m", "serve", *words]
            transcript.run(f"$ {shlex.join(command)}", [*inside, *command])


def runtime_of(bundle: Path) -> list[str]:
    """The words before a command of the runtime, which keeps the state of its containers in WORK/crun."""
    return [*RUNTIME, "--root", str(bundle.parent / "crun")]


@contextmanager
def server(bundle: Path, config: Mapping[str, Any], transcript: Transcript) -> Iterator[list[str]]:
    """Runs the command of a bundle until it says that it serves; then SIGTERM, upon which it has to end with 0.

    Yields the words before a command that runs in the same container, as the same user.
    """
    runtime = runtime_of(bundle)
    command, user = [*runtime, "run", "--bundle", str(bundle), CONTAINER], config["process"]["user"]
    transcript.lines.append(f"$ {' '.join(SETTINGS)} {shlex.join(config['process']['args'])}")
    printed: list[str] = []
    ready = threading.Event()  # or ended

    def read(lines: Iterable[str]) -> None:
        for line in lines:
            printed.append(line.rstrip())
            if line.startswith("serving "):
                ready.set()
        ready.set()

    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            reader = threading.Thread(target=read, args=[process.stdout])
            reader.start()
            try:
                if not ready.wait(START_S) or not printed or not printed[-1].startswith("serving "):
                    raise click.ClickException("\n".join(["the server did not start:", *printed]))
                started = len(printed)
                transcript.lines += [*printed, ""]
                yield [*runtime, "exec", "--user", f"{user['uid']}:{user['gid']}", CONTAINER]
                output([*runtime, "kill", CONTAINER, "TERM"])
                process.wait(timeout=STOP_S)
                reader.join()
                transcript.lines += ["SIGTERM", *printed[started:], f"exit status {process.returncode}", ""]
                if process.returncode:
                    transcript.failures.append(f"SIGTERM: exit status {process.returncode}")
            finally:
                if process.poll() is None:
                    delete(runtime)
    finally:
        delete(runtime)


def delete(runtime: Sequence[str]) -> None:
    """Ends and removes the container, if there is one."""
    command = [*runtime, "delete", "--force", CONTAINER]
    subprocess.run(command, check=False, capture_output=True, timeout=COMMAND_S)


def state(runtime: Sequence[str]) -> dict[str, str]:
    """Of the running container, as text."""
    found = json.loads(output([*runtime, "state", CONTAINER]))
    return {name: str(value) for name, value in found.items()}


def output(command: Sequence[str]) -> str:
    """What a command prints. Raises click.ClickException with its errors where it fails."""
    ended = subprocess.run(command, cwd=ROOT, check=False, text=True, capture_output=True, timeout=COMMAND_S)
    if ended.returncode:
        raise click.ClickException(f"{shlex.join(command)}: {(ended.stderr or ended.stdout).strip()[-2000:]}")
    return ended.stdout


if __name__ == "__main__":
    main()
