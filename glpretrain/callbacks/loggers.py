"""Where numbers go: metrics.csv in the run folder, and wandb, which must never hold up a run or fail it, or loggers of the user's.

What is logged is left out (methods and the other callbacks).
"""

import logging
import netrc
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import wandb
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from wandb.errors import Error as WandbError

from glpretrain.core.files import write_whole

Mode = Literal["online", "offline", "shared", "disabled", "dryrun", "run"]
_log = logging.getLogger(__name__)
_INIT_SECONDS = 60.0


def run_loggers(
    folder: Path, *, own: Sequence[Logger] = (), recipe: str, about: Mapping[str, object], resumed: bool = False
) -> list[Logger]:
    """The loggers of one run, for the first process only: a table, and the user's own, or wandb where there are none.

    Args:
        folder: folder of the run.
        own: loggers that a recipe or the command line names; a `CSVLogger` among them takes the place of the table.
        recipe: name of what is trained.
        about: settings of the run, versions, commit and machine, which every logger but the table is told.
        resumed: whether the run goes on, and so do its table and its run in wandb.
    """
    table = [] if any(isinstance(logger, CSVLogger) for logger in own) else [_table(folder)]
    for logger in own:
        logger.log_hyperparams(dict(about))
    online = None if own else _wandb_logger(folder, recipe, about=about, resumed=resumed)
    return [*table, *own] if online is None else [*table, online]


def _table(folder: Path) -> CSVLogger:
    """metrics.csv, which goes on where there is one."""
    path = folder / "metrics.csv"
    rows = path.read_text() if path.is_file() else ""
    table = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=50)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # Lightning clears the table, which is put back
        writer = table.experiment
    if rows:
        write_whole(path, rows.encode())
        writer.metrics_keys = rows.partition("\n")[0].split(",")
    return table


def finish(loggers: list[Logger]) -> None:
    """Close wandb's run, so that the next fit of this process gets one of its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def wandb_mode() -> Mode:
    """`WANDB_MODE` where the user sets it; otherwise online for users who are logged in and offline for the others.

    Raises:
        ValueError: `WANDB_MODE` is set to something else.
    """
    if "WANDB_MODE" in os.environ:
        for mode in get_args(Mode):
            if mode == os.environ["WANDB_MODE"]:
                return mode
        raise ValueError(f"WANDB_MODE: {os.environ['WANDB_MODE']}; accepted: {', '.join(get_args(Mode))}")
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc("api.wandb.ai") else "offline"


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_logger(folder: Path, recipe: str, *, about: Mapping[str, object], resumed: bool) -> WandbLogger | None:
    mode = wandb_mode()
    if mode == "disabled":
        return None
    settings = wandb.Settings(mode=mode, silent=True, console="off", init_timeout=_INIT_SECONDS, reinit="finish_previous")
    try:
        path = folder / "wandb_run.txt"
        known = path.read_text().strip() if resumed and path.is_file() else None
        run = wandb.init(
            project="glpretrain",
            name=f"{recipe}/{folder.name}",
            dir=folder,
            id=known,
            resume=None if known is None else "allow",
            settings=settings,
        )
        run.config.update(dict(about), allow_val_change=True)  # a run that goes on may do so on another machine
        path.write_text(f"{run.id}\n")
    except (WandbError, OSError) as error:
        _log.warning("wandb: not used in this run (%s); metrics.csv has the same numbers", " ".join(str(error).split()))
        return None
    return WandbLogger(experiment=run, save_dir=folder)
