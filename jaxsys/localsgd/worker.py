"""The program of one worker process: ``python -m jaxsys.localsgd.worker JOB.json``.

Events go to standard output as marked JSON lines, for `jaxsys.localsgd.supervise` to read.
"""

import sys
from pathlib import Path
from typing import Any

from jaxsys.cluster import join, leave
from jaxsys.cluster.events import say, say_mistake
from jaxsys.core.errors import UserError
from jaxsys.localsgd.job import Job, run
from jaxsys.train import NonFiniteError


def main(job_file: str) -> None:
    """Run the job; worker 0 prints its events; a mistake is one marked sentence and status 2."""
    try:
        job = Job.from_json(Path(job_file).read_text())
        first = join().process_id == 0

        def emit(event: dict[str, Any]) -> None:
            if first:
                say(event)

        run(job, emit)
    except UserError as error:
        say_mistake(error)
        leave(2)
    except NonFiniteError as error:
        say_mistake(error)
        leave(3)


if __name__ == "__main__":
    main(sys.argv[1])
