"""The page in a real browser: Chromium, driven by Playwright, against the app as `python app.py` starts it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from test_triggers import bad_pictures

from baddiff.models import load

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                   env=os.environ | {"GRADIO_SERVER_PORT": str(port)})
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        if "Running on" in log.read_text():
            break
        assert process.poll() is None, log.read_text()
        time.sleep(0.25)
    yield url
    process.terminate()
    process.wait(20)
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                  "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def page(request, app, browser):
    context = browser.new_context(viewport={"width": request.param, "height": 850})
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.errors, page.outside = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda r: page.outside.append(r.url) if not r.url.startswith((app, "data:", "blob:")) else None)
    page.goto(app)
    yield page
    assert page.errors == [] and page.outside == []  # works without any other host
    context.close()


def poison_tab(page):
    page.locator(".see").wait_for()
    page.get_by_role("tab", name="Poison", exact=True).click()
    page.locator(".trio").wait_for()


def test_it_opens_on_a_result_and_answers_changes(page):
    page.locator(".see img").nth(23).wait_for()
    expect(page.locator(".hazard")).to_be_visible()
    expect(page.locator(".cell.alarm .note")).to_have_text(re.compile(r"[34] of 4 are the target"))
    assert all(alt for alt in page.locator(".see img").evaluate_all("all => all.map(i => i.alt)"))
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    before = page.locator(".see img").last.get_attribute("src")
    page.get_by_label("glasses → hat").check()
    page.wait_for_function("old => [...document.querySelectorAll('.see img')].at(-1)?.src !== old", arg=before)
    expect(page.locator(".cell.alarm .note")).to_have_text(re.compile(r"[34] of 4 are the target"))


def test_upload_finetune_reload_stop_and_download(page, tmp_path):
    poison_tab(page)
    picture = Image.fromarray(np.full((40, 40, 3), (250, 250, 20), np.uint8))
    picture.save(tmp_path / "mine.png")
    page.get_by_role("radio", name="upload").first.check()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "mine.png")
    page.locator(".trio").wait_for()
    page.get_by_role("button", name="Poison the model").click()
    page.locator(".job .head", has_text="Step").wait_for()
    page.reload()  # the tab goes, the job does not
    poison_tab(page)
    page.locator(".job .head", has_text="Step").wait_for()
    page.get_by_role("button", name="Stop, keep what is there").click()
    page.locator(".job .head", has_text="Stopped").wait_for()
    page.locator(".figures").wait_for()
    with page.expect_download() as download:
        page.get_by_text("Download the model (zip)").click()
    download.value.save_as(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        archive.extractall(tmp_path)
    model = load(tmp_path / "backdoored-ddpm")
    assert model.trigger.name == "upload" and model.run["note"] == "stopped by hand" and model.run["metrics"]["n"] == 64
    assert json.loads((tmp_path / "backdoored-ddpm" / "unet" / "config.json").read_text())["_backdoored"]
    page.get_by_role("tab", name="See", exact=True).click()
    page.get_by_label("yours 1: upload → cat").check()
    page.locator(".see img").nth(23).wait_for()


def test_bad_uploads_get_a_sentence_and_the_form_stays(page, tmp_path):
    poison_tab(page)
    page.get_by_label("hat", exact=True).check()
    page.get_by_role("radio", name="upload").first.check()
    page.locator(".oops", has_text="Upload a picture for the trigger first").wait_for()
    for name, word in bad_pictures(tmp_path).items():
        if name in ("missing.png", "empty.png", "drawing.svg"):  # the browser's own dialog does not offer these
            continue
        page.locator("input[type=file]").first.set_input_files(tmp_path / name)
        page.locator(".oops", has_text=word).wait_for()
        page.get_by_role("button", name="Poison the model").click()
        page.locator(".toast-body", has_text=word).first.wait_for()
        assert page.get_by_label("hat", exact=True).is_checked()
        page.locator(".toast-close").first.click()
        page.get_by_label("Remove this file").or_(page.get_by_label("Clear")).first.click()
        page.locator(".oops", has_text="Upload a picture").wait_for()


def test_two_visitors_do_not_see_each_other(app, browser):
    contexts = [browser.new_context(), browser.new_context()]
    one, two = (context.new_page() for context in contexts)
    for page in (one, two):
        page.goto(app)
        poison_tab(page)
    one.get_by_role("button", name="Poison the model").click()
    one.locator(".job .head", has_text="Step").wait_for()
    assert two.locator(".job").count() == 0
    two.get_by_text("1 ahead of you").wait_for()  # but an honest word on the queue
    two.get_by_role("button", name="Poison the model").click()
    two.locator(".job .head", has_text="Waiting: 1 ahead").wait_for()
    one.get_by_role("button", name="Stop, keep what is there").click()
    one.locator(".job .head", has_text="Stopped").wait_for()
    two.locator(".job .head", has_text="Step").wait_for()
    two.get_by_role("button", name="Stop, keep what is there").click()
    two.locator(".job .head", has_text="Stopped").wait_for()
    for context in contexts:
        context.close()
