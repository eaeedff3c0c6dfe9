"""`python -m uvicorn` whose workers are forked, because each new interpreter imports all modules of a server again."""

import multiprocessing

from uvicorn import _subprocess
from uvicorn.main import main

vars(_subprocess)["spawn"] = multiprocessing.get_context("fork")

main(prog_name="uvicorn")
