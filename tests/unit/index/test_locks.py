import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rag_lightning.errors import ConfigError
from rag_lightning.index.locks import SnapshotLock

REFUSAL = "taken by {owner}: wait"
HOLDER = """
import sys, time
from pathlib import Path
from rag_lightning.index.locks import SnapshotLock
lock = SnapshotLock(Path(sys.argv[1]), refusal="taken")
print("held", flush=True)
time.sleep(600)
"""


def test_one_holder_at_a_time_who_is_named(tmp_path):
    path = tmp_path / ".lock"
    with SnapshotLock(path, refusal=REFUSAL):
        owner = f"taken by pid {os.getpid()} on host {socket.gethostname()}: wait"
        for _ in range(2):  # asking changes nothing, not even the name of the holder
            with pytest.raises(ConfigError, match=re.escape(owner)):
                SnapshotLock(path, refusal=REFUSAL)
    assert not path.exists()
    lock = SnapshotLock(path, refusal=REFUSAL)
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_release_of_a_folder_that_has_moved(tmp_path):
    (tmp_path / "old").mkdir()
    lock = SnapshotLock(tmp_path / "old" / "lock", refusal=REFUSAL)
    (tmp_path / "old").rename(tmp_path / "new")
    lock.release(tmp_path / "new" / "lock")
    assert list((tmp_path / "new").iterdir()) == []
    SnapshotLock(tmp_path / "new" / "lock", refusal=REFUSAL).release()


def test_the_death_of_the_holder_releases(tmp_path):
    path = tmp_path / ".lock"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"taken by pid {process.pid} on host"):
            SnapshotLock(path, refusal=REFUSAL)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    SnapshotLock(path, refusal=REFUSAL).release()
