"""A refresh beside training: a process of its own encodes and builds, training takes the result live when it is there.

The other side is :mod:`rag_lightning.retrieval.index_builder`.
"""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from rag_lightning.errors import CorruptSnapshotError, RagError
from rag_lightning.index.snapshot import Snapshot
from rag_lightning.retrieval.index_builder import (
    DONE_FILE,
    FAILED_FILE,
    JOB_FILE,
    copy_of_passage_tower,
    write_job,
)
from rag_lightning.training.live_index import LiveIndex
from rag_lightning.utils import distributed
from rag_lightning.utils.io import read_json

logger = logging.getLogger(__name__)

FAILED, BUILDING, OPENED = -1, 0, 1
"""What a process knows of a refresh under way; the least of all processes' is what they act on."""

POLL_S = 0.02
JOB_FOLDERS = ".job-step*"


@dataclass
class Refresh:
    """One refresh as this process sees it; threads of an earlier one write into theirs.

    Attributes:
        step: When it began.
        folder: Its job.
        attempts: How often the builder was asked.
        submitted: When it was last asked, on the clock of ``time.monotonic``.
        export: Writes the job, on rank 0.
        opening: Opens the finished snapshot.
        opened: What came of it: the snapshot, or why not.
    """

    step: int
    folder: Path
    attempts: int = 0
    submitted: float = 0.0
    export: threading.Thread | None = None
    opening: threading.Thread | None = None
    opened: Snapshot | Exception | None = None

    @property
    def state(self) -> int:
        """``FAILED``, ``BUILDING`` or ``OPENED``."""
        if isinstance(self.opened, Exception):
            return FAILED
        return BUILDING if self.opened is None else OPENED


class AsyncRefresher:
    """Leaves encoding and building to a process of its own (:mod:`rag_lightning.retrieval.index_builder`).

    Training pays for a copy of the passage tower when a refresh begins and for a change of pointers when it ends. In
    between, each process opens the finished snapshot in a thread; how far each is goes round in one number that is
    sent before a batch and read after it, so that no process waits for another. All take it live at the same step.

    A builder that dies (killed, out of memory, disk full) is started again for the same job; after ``max_attempts`` the
    refresh is given up with a warning, and training goes on with the snapshot it has.

    Args:
        passages: The passage file.
        cache_dir: Where token stores are.
        device: Where the builder encodes, such as ``cuda:1``; None is the model's device.
        num_threads: CPU threads of the builder; None gives it as many as this process.
        lag_steps: Take the new snapshot live exactly so many steps after the refresh began, waiting if need be: a run
            can then be repeated exactly, and 0 is a refresh without lag. None takes it as soon as it is there.
        max_attempts: How often to try a refresh.
        timeout_s: Seconds after which an attempt is given up and its builder killed.
        niceness: Added to the builder's, so that training comes first where cores are shared.
    """

    def __init__(
        self,
        *,
        passages: str,
        cache_dir: Path,
        device: str | None = None,
        num_threads: int | None = None,
        lag_steps: int | None = None,
        max_attempts: int = 3,
        timeout_s: float = 21_600.0,
        niceness: int = 5,
    ) -> None:
        self._passages = passages if passages.startswith("bundled:") else str(Path(passages).absolute())
        self._cache_dir = cache_dir
        self._device = device
        self._num_threads = num_threads
        self._lag_steps = lag_steps
        self._max_attempts = max_attempts
        self._timeout_s = timeout_s
        self._niceness = niceness
        self._process: subprocess.Popen[str] | None = None
        self._current: Refresh | None = None
        self._run = ""
        self._kept: Path | None = None
        self._flag: Tensor | None = None
        self._sent: Any = None

    @property
    def pending_step(self) -> int | None:
        """The step of the refresh under way, or None."""
        return self._current.step if self._current is not None else None

    @property
    def pending_folder(self) -> str | None:
        """The name of its job's folder, for a checkpoint."""
        return self._current.folder.name if self._current is not None else None

    def start(self, index: LiveIndex, *, keep: str | None = None) -> None:
        """Agrees on a name for this run, clears what earlier ones left, and starts the builder before it is needed.

        Its imports then do not count against the first refresh. Called by all processes.

        Args:
            index: Where snapshots lie.
            keep: The job that a restored checkpoint wants to go on with.
        """
        self._run = distributed.broadcast_object(uuid.uuid4().hex[:8])
        if distributed.rank() == 0:
            for left in [*index.root.glob(JOB_FOLDERS), *index.root.glob(f".{JOB_FOLDERS}")]:
                if left.name != keep:
                    shutil.rmtree(left, ignore_errors=True)
            self._start_builder(index)

    def begin(self, index: LiveIndex, step: int, probe_PD: Float[Tensor, "P D"] | None) -> None:
        """Copies the passage tower and hands it on; the writing happens in a thread."""
        refresh = self._expect(step, index.root / f".job-step{step:08d}-{self._run}")
        if distributed.rank() != 0:
            return
        assert index.model.encoder is not None
        tower = copy_of_passage_tower(index.model.encoder)
        probe_PD = probe_PD.cpu() if probe_PD is not None else None
        device = self._device if self._device is not None else str(index.device)
        job = index.job(step, passages=self._passages, cache_dir=self._cache_dir, device=device)

        def export() -> None:
            try:
                write_job(refresh.folder, job, tower, probe_PD)
                self._submit(index, refresh)
            except Exception as error:
                refresh.opened = error

        refresh.export = threading.Thread(target=export, daemon=True)
        refresh.export.start()

    def resume(self, index: LiveIndex, step: int, folder: str) -> bool:
        """Goes on with a refresh that a checkpoint found under way; False where its passage tower was not kept."""
        refresh = self._expect(step, index.root / folder)
        found = True
        if distributed.rank() == 0:
            found = (refresh.folder / JOB_FILE).is_file()
            for name in (DONE_FILE, FAILED_FILE) if found else ():
                (refresh.folder / name).unlink(missing_ok=True)
            if found:
                self._submit(index, refresh)
        found = distributed.broadcast_object(found)
        self._kept = refresh.folder
        if not found:
            self._current = None
        return found

    def checkpoint(self) -> None:
        """Waits until the passage tower of a refresh under way is on disk, and keeps it until the next checkpoint."""
        self._settle()
        before, self._kept = self._kept, self._current.folder if self._current is not None else None
        if distributed.rank() == 0 and before is not None and before != self._kept:
            shutil.rmtree(before, ignore_errors=True)

    def _settle(self) -> None:
        if self._current is not None and self._current.export is not None:
            self._current.export.join()

    def announce(self, device: torch.device) -> None:
        """Sends how far this process is, without waiting for the others."""
        if self._current is None or self._lag_steps is not None or self._sent is not None:
            return
        if distributed.world_size() > 1:
            self._flag = torch.tensor([self._current.state], dtype=torch.int32, device=device)
            self._sent = dist.all_reduce(self._flag, op=dist.ReduceOp.MIN, async_op=True)

    def finish(self, index: LiveIndex, step: int) -> Snapshot | None:
        """Returns the new snapshot once every process has it open, or after exactly the lag asked for."""
        if self._current is None:
            return None
        self._look(index, self._current)
        if self._lag_steps is not None:
            if step - self._current.step < self._lag_steps:
                return None
            state = self._wait_for_all(index, self._current)
        else:
            state = self._agreed(self._current)
        return None if state == BUILDING else self._end(index, self._current, state)

    def close(self, index: LiveIndex | None = None) -> None:
        """Ends the builder and clears what it leaves; the job of an unfinished refresh stays, for a resumed run."""
        self._settle()
        running = self._process is not None
        self._end_builder()
        if self._current is not None and self._current.opening is not None:
            self._current.opening.join()
        if running and index is not None:
            index.store().sweep()

    # ------------------------------------------------------------------ one refresh

    def _expect(self, step: int, folder: Path) -> Refresh:
        assert self._current is None, "one refresh at a time"
        self._current = Refresh(step, folder)
        return self._current

    def _start_builder(self, index: LiveIndex) -> None:
        if self._process is None or self._process.poll() is not None:
            self._end_builder()
            threads = self._num_threads if self._num_threads is not None else torch.get_num_threads()
            self._process = _spawn(index.root, threads, self._niceness)

    def _end_builder(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what was left unread for one that has died
            self._process.stdin.close()
        self._process = None

    def _submit(self, index: LiveIndex, refresh: Refresh) -> None:
        refresh.attempts += 1
        refresh.submitted = time.monotonic()
        try:
            self._start_builder(index)
            assert self._process is not None
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died just now; the next look starts another
                self._process.stdin.write(f"{refresh.folder.absolute()}\n")
                self._process.stdin.flush()
        except OSError as error:  # no process can be started: the refresh is lost, training is not
            refresh.opened = error

    def _look(self, index: LiveIndex, refresh: Refresh) -> None:
        """Rank 0 looks after the builder; every process opens the snapshot, in a thread, once it is there."""
        exporting = refresh.export is not None and refresh.export.is_alive()
        if distributed.rank() == 0 and not exporting and refresh.opened is None:
            self._look_after(index, refresh)
        if exporting or refresh.opening is not None or not (refresh.folder / DONE_FILE).is_file():
            return

        def opening() -> None:
            try:
                done = read_json(refresh.folder / DONE_FILE, "finished refresh")
                refresh.opened = index.open_whole(done["snapshot_id"])  # the builder has just read it back
            except Exception as error:
                refresh.opened = error

        refresh.opening = threading.Thread(target=opening, daemon=True)
        refresh.opening.start()

    def _look_after(self, index: LiveIndex, refresh: Refresh) -> None:
        failed, reason = refresh.folder / FAILED_FILE, None
        if (refresh.folder / DONE_FILE).is_file():
            return
        if failed.is_file():
            reason = str(read_json(failed, "failed refresh")["error"])
        elif self._process is None or self._process.poll() is not None:
            status = self._process.returncode if self._process is not None else None
            reason = f"the index builder ended with status {status}"
        elif time.monotonic() - refresh.submitted > self._timeout_s:
            reason = f"the index builder did not finish within {self._timeout_s:g} seconds (reindex.timeout_s)"
            self._end_builder()
        if reason is None:
            return
        again = refresh.attempts < self._max_attempts
        logger.warning(
            "refresh of step %d, attempt %d of %d: %s (messages: %s). Training goes on with the index it has%s",
            refresh.step,
            refresh.attempts,
            self._max_attempts,
            reason,
            _log_file(index.root),
            "; trying again." if again else ".",
        )
        if again:
            failed.unlink(missing_ok=True)
            self._submit(index, refresh)
        else:
            refresh.opened = CorruptSnapshotError(reason)

    def _agreed(self, refresh: Refresh) -> int:
        """Returns the least of all processes' states, as each had announced it before this step."""
        if distributed.world_size() == 1:
            return refresh.state
        if self._sent is None or self._flag is None:
            return BUILDING
        self._sent.wait()
        state = int(self._flag.item())
        self._sent = self._flag = None
        return state

    def _wait_for_all(self, index: LiveIndex, refresh: Refresh) -> int:
        while True:
            self._look(index, refresh)
            state = min(distributed.gather_objects(refresh.state))
            if state != BUILDING:
                return state
            time.sleep(POLL_S)

    def _end(self, index: LiveIndex, refresh: Refresh, state: int) -> Snapshot | None:
        self._current = None
        opened: Snapshot | Exception | None = refresh.opened
        if state == OPENED and isinstance(opened, Snapshot):
            try:
                opened = index.divided(opened)  # with shards, together; an error is then everybody's
            except RagError as error:
                opened = error
        # all processes have opened the snapshot, or none ever will; a run resumed from the last checkpoint may want it
        if distributed.rank() == 0 and refresh.folder != self._kept:
            shutil.rmtree(refresh.folder, ignore_errors=True)
        if state == OPENED and isinstance(opened, Snapshot):
            return opened
        reason = opened if isinstance(opened, Exception) else "another process could not open it"
        logger.warning("the refresh of step %d was given up: %s", refresh.step, reason)
        return None


def _log_file(root: Path) -> Path:
    return root / ".builder.log"


def _spawn(root: Path, num_threads: int, niceness: int) -> subprocess.Popen[str]:
    root.mkdir(parents=True, exist_ok=True)
    ours = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RAG_LIGHTNING_COMMAND")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false"}
    program = f"import os; os.nice({niceness}); from rag_lightning.retrieval.index_builder import main; main()"
    with _log_file(root).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is the trainer's to answer; the builder ends when its input closes
        )
