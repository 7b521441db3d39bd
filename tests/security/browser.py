"""A headless Chromium and its driver, from the packages of the machine. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.servers import RunFolder
from tests.servers.process import MARK_VARIABLE, find_program

#: Seconds for a page, and for what a script has yet to put into it.
TIMEOUT = 30


@contextlib.contextmanager
def browser(run: RunFolder) -> Iterator[Chrome]:
    """
    A browser window of its own.

    Raises ServerMissing.
    """
    name = run.name("browser")
    # Not below tmp_path, whose length a socket's name cannot have.
    home = run.data(name)
    home.mkdir()
    options = ChromeOptions()
    options.binary_location = find_program("chromium", "/usr/lib/chromium", "/usr/bin")
    driver = find_program("chromedriver", "/usr/lib/chromium", "/usr/bin")
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which root may not have
        "--disable-dev-shm-usage",  # 64 MB in a container
        "--disable-gpu",
        "--no-first-run",
        "--window-size=1440,780",
        f"--user-data-dir={home / 'profile'}",
    ):
        options.add_argument(argument)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home)}
    service = Service(driver, env=environment | {MARK_VARIABLE: run.mark(name)})
    chrome = Chrome(options, service)
    try:
        chrome.set_page_load_timeout(TIMEOUT)
        yield chrome
    finally:
        chrome.quit()
