"""How a refresh is carried out: in the training processes while they wait, or in a process of its own.

Both go through the same three moments, always at the end of an optimiser step: ``begin`` takes the passage tower as it
is, ``ready`` tells whether all processes can search the new snapshot, and then it goes live in all of them at once.
"""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from rag_lightning.errors import ConfigError, CorruptSnapshotError
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
from rag_lightning.utils.io import read_json, write_json

logger = logging.getLogger(__name__)

FAILED, BUILDING, OPENED = -1, 0, 1
"""What a process knows of a refresh under way; the least of all processes' is what they act on."""

POLL_S = 0.02


class Refresher(Protocol):
    """Carries refreshes out, one at a time."""

    @property
    def pending_step(self) -> int | None:
        """The step of the refresh under way, or None."""
        ...

    def begin(self, index: LiveIndex, step: int, probe_PD: Float[Tensor, "P D"] | None) -> None:
        """Starts a refresh with the passage tower as it is now."""
        ...

    def announce(self, device: torch.device) -> None:
        """Called before each batch: tells the other processes, without waiting, how far this one is."""
        ...

    def finish(self, index: LiveIndex, step: int) -> Snapshot | None:
        """Returns the new snapshot where all processes take it live now, at the end of ``step``; else None."""
        ...

    def close(self) -> None:
        """Ends what runs beside training."""
        ...


class SyncRefresher:
    """Encodes and builds in the training processes, each its part of the corpus, while training waits."""

    pending_step: int | None = None

    def __init__(self) -> None:
        self._built: Snapshot | None = None

    def begin(self, index: LiveIndex, step: int, probe_PD: Float[Tensor, "P D"] | None) -> None:
        """Builds the new snapshot at once."""
        self._built = index.build(step, probe_PD=probe_PD)

    def announce(self, device: torch.device) -> None:
        """Nothing runs beside training."""

    def finish(self, index: LiveIndex, step: int) -> Snapshot | None:
        """Returns the snapshot just built."""
        built, self._built = self._built, None
        return built

    def close(self) -> None:
        """Nothing runs beside training."""


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
        niceness: int = 5,
    ) -> None:
        self.pending_step: int | None = None
        self._passages = passages if passages.startswith("bundled:") else str(Path(passages).absolute())
        self._cache_dir = cache_dir
        self._device = device
        self._num_threads = num_threads
        self._lag_steps = lag_steps
        self._max_attempts = max_attempts
        self._niceness = niceness
        self._process: subprocess.Popen[str] | None = None
        self._folder = Path()
        self._attempts = 0
        self._export: threading.Thread | None = None
        self._export_error: Exception | None = None
        self._opening: threading.Thread | None = None
        self._opened: Snapshot | str | Exception | None = None
        self._flag: Tensor | None = None
        self._sent: Any = None

    def start(self, index: LiveIndex) -> None:
        """Starts the builder before it is needed, so that its imports do not count against the first refresh."""
        if distributed.rank() == 0 and (self._process is None or self._process.poll() is not None):
            self._end_builder()
            self._process = _spawn(index.root, self._threads(), self._niceness)

    def begin(self, index: LiveIndex, step: int, probe_PD: Float[Tensor, "P D"] | None) -> None:
        """Copies the passage tower and hands it on; the writing happens in a thread."""
        self._expect(index, step)
        if distributed.rank() != 0:
            return
        assert index.model.encoder is not None
        tower = copy_of_passage_tower(index.model.encoder)
        probe_PD = probe_PD.cpu() if probe_PD is not None else None
        device = self._device if self._device is not None else str(index.device)
        job = index.job(step, passages=self._passages, cache_dir=self._cache_dir, device=device)

        def export() -> None:
            try:
                write_job(self._folder, job, tower, probe_PD)
                self._submit(index)
            except Exception as error:
                self._export_error = error

        self._export = threading.Thread(target=export, daemon=True)
        self._export.start()

    def resume(self, index: LiveIndex, step: int) -> bool:
        """Goes on with a refresh that a checkpoint found under way; False where its passage tower was not kept."""
        self._expect(index, step)
        published = index.published_at(step)
        if distributed.rank() == 0 and published is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / DONE_FILE, {"snapshot_id": published, "seconds": 0.0})
        elif distributed.rank() == 0 and (self._folder / JOB_FILE).is_file():
            (self._folder / FAILED_FILE).unlink(missing_ok=True)
            self._submit(index)
        elif distributed.rank() == 0:
            self.pending_step = None
        self.pending_step = distributed.broadcast_object(self.pending_step)
        return self.pending_step is not None

    def settle(self) -> None:
        """Waits until the passage tower of a refresh under way is on disk: a checkpoint counts on it."""
        if self._export is not None:
            self._export.join()

    def announce(self, device: torch.device) -> None:
        """Sends how far this process is, without waiting for the others."""
        if self.pending_step is None or self._lag_steps is not None or self._sent is not None:
            return
        if distributed.world_size() > 1:
            self._flag = torch.tensor([self._state()], dtype=torch.int32, device=device)
            self._sent = dist.all_reduce(self._flag, op=dist.ReduceOp.MIN, async_op=True)

    def finish(self, index: LiveIndex, step: int) -> Snapshot | None:
        """Returns the new snapshot once every process has it open, or after exactly the lag asked for."""
        if self.pending_step is None:
            return None
        self._look(index)
        if self._lag_steps is not None:
            if step - self.pending_step < self._lag_steps:
                return None
            state = self._wait_for_all(index)
        else:
            state = self._agreed()
        if state == BUILDING:
            return None
        return self._end(index, state)

    def close(self) -> None:
        """Ends the builder; an unfinished refresh is left on disk, for a run that resumes."""
        self.settle()
        self._end_builder()
        if self._opening is not None:
            self._opening.join()

    # ------------------------------------------------------------------ one refresh

    def _expect(self, index: LiveIndex, step: int) -> None:
        if self.pending_step is not None:
            raise ConfigError(f"a refresh is under way since step {self.pending_step}; a second one cannot begin")
        self.pending_step = step
        self._folder = index.root / f".job-step{step:08d}"
        self._attempts = 0
        self._export = self._opening = self._export_error = self._opened = None

    def _end_builder(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what was left unread for one that has died
            self._process.stdin.close()
        self._process = None

    def _threads(self) -> int:
        return self._num_threads if self._num_threads is not None else torch.get_num_threads()

    def _submit(self, index: LiveIndex) -> None:
        self.start(index)
        assert self._process is not None
        assert self._process.stdin is not None
        self._attempts += 1
        with contextlib.suppress(OSError):  # it died just now; the next look starts another
            self._process.stdin.write(f"{self._folder.absolute()}\n")
            self._process.stdin.flush()

    def _look(self, index: LiveIndex) -> None:
        """Rank 0 looks after the builder; every process opens the snapshot, in a thread, once it is there."""
        if distributed.rank() == 0 and (self._export is None or not self._export.is_alive()):
            self._look_after(index)
        if self._opening is not None or self._opened is not None or not (self._folder / DONE_FILE).is_file():
            return
        snapshot_id = read_json(self._folder / DONE_FILE, "finished refresh")["snapshot_id"]
        if index.settings.sharded:  # opened by all together, when all have seen it: see _end
            self._opened = snapshot_id
            return

        def opening() -> None:
            try:
                self._opened = index.open(snapshot_id, verify=False)  # the builder has just read it back
            except Exception as error:
                self._opened = error

        self._opening = threading.Thread(target=opening, daemon=True)
        self._opening.start()

    def _look_after(self, index: LiveIndex) -> None:
        failed = self._folder / FAILED_FILE
        if (self._folder / DONE_FILE).is_file() or (self._export_error is None and self._attempts > self._max_attempts):
            return
        reason = str(self._export_error) if self._export_error is not None else None
        if reason is None and failed.is_file():
            reason = str(read_json(failed, "failed refresh")["error"])
        if reason is None and self._process is not None and self._process.poll() is not None:
            reason = f"the index builder ended with status {self._process.returncode}"
        if reason is None:
            return
        again = self._attempts < self._max_attempts and self._export_error is None
        logger.warning(
            "refresh of step %d, attempt %d of %d: %s (%s). Training goes on with the index it has%s",
            self.pending_step,
            self._attempts,
            self._max_attempts,
            reason,
            f"its messages are in {_log_file(index.root)}",
            "; trying again." if again else ".",
        )
        if again:
            failed.unlink(missing_ok=True)
            self._submit(index)
        else:
            self._attempts = self._max_attempts + 1
            self._opened = CorruptSnapshotError(reason)

    def _state(self) -> int:
        if isinstance(self._opened, Exception):
            return FAILED
        return BUILDING if self._opened is None else OPENED

    def _agreed(self) -> int:
        """Returns the least of all processes' states, as each had announced it before this step."""
        if distributed.world_size() == 1:
            return self._state()
        if self._sent is None or self._flag is None:
            return BUILDING
        self._sent.wait()
        state = int(self._flag.item())
        self._sent = self._flag = None
        return state

    def _wait_for_all(self, index: LiveIndex) -> int:
        while True:
            self._look(index)
            states = distributed.gather_objects(self._state())
            if min(states) != BUILDING:
                return min(states)
            time.sleep(POLL_S)

    def _end(self, index: LiveIndex, state: int) -> Snapshot | None:
        opened, folder = self._opened, self._folder
        self.pending_step, self._opened = None, None
        if distributed.rank() == 0:
            # all processes have opened the snapshot, or none ever will
            threading.Thread(target=shutil.rmtree, args=(folder, True), daemon=True).start()
        if state == OPENED and not isinstance(opened, Exception):
            return index.open(opened, verify=False) if isinstance(opened, str) else opened
        if isinstance(opened, Exception):
            logger.warning("the refresh was given up: %s", opened)
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
