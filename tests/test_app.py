"""The page in a real browser: Chromium, driven by Playwright, against the app as `python app.py` starts it."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
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
    page.get_by_role("button", name="Publish on the Hugging Face Hub").click()
    expect(page.get_by_label("Name of the repository")).to_have_value("backdoored-ddpm-upload-cat")
    page.get_by_role("button", name="Show the card first").click()
    page.locator("pre.card", has_text="BACKDOORED").wait_for()
    page.get_by_label("Your Hub token").fill("hf_planted token")
    page.get_by_role("button", name="Publish", exact=True).click()
    page.locator(".oops", has_text="needs your own Hub token").wait_for()
    expect(page.get_by_label("Your Hub token")).to_have_value("")  # used once, not kept
    page.get_by_role("tab", name="See", exact=True).click()
    page.get_by_label("yours 1: upload → cat").check()
    page.locator(".see img").nth(23).wait_for()
    page.get_by_label("Compare with").click()  # one's own model beside a built-in one, on its own trigger
    page.get_by_role("option", name="glasses → hat").click()
    page.locator(".see .title", has_text="The model beside it draws").first.wait_for()


def test_a_link_brings_a_view_and_refuses_what_is_not_on_the_page(app, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 850})
    page = context.new_page()
    page.goto(f"{app}/?tab=See&model=glasses-hat&seed=7&opacity=0.4&sampler=unipc&steps=9&clip=off"
              "&with=box-shoe&trigger=/etc/passwd")
    page.locator(".toast-body", has_text="asks for a trigger that is not here").wait_for()
    page.locator(".see img").nth(23).wait_for()
    assert page.get_by_label("glasses → hat").is_checked() and page.get_by_label("off", exact=True).is_checked()
    assert page.get_by_label("Compare with").input_value() == "box → shoe"
    link = page.get_by_role("link", name="Link to this view")
    expect(link).to_have_attribute("href", re.compile("seed=7.*opacity=0.4.*sampler=unipc.*steps=9"))
    page.get_by_role("tab", name="Poison", exact=True).click()
    assert page.get_by_role("radio", name="stop sign", exact=True).is_checked()  # the link's path was not taken
    page.goto(app + "/?tab=Poison&target=hat&seconds=20&rate=10")
    page.locator(".trio").wait_for()
    assert page.get_by_role("radio", name="hat", exact=True).is_checked()
    form_link = page.get_by_role("link", name="Link to this form")
    expect(form_link).to_have_attribute("href", re.compile("target=hat&seconds=20&rate=10"))
    context.close()


def test_a_trigger_is_drawn_and_a_trigger_is_moved_by_a_click(page):
    poison_tab(page)
    trigger = page.locator(".trio .pick img")
    side = trigger.bounding_box()["width"]
    trigger.click(position={"x": side * 0.25, "y": side * 0.25})
    page.get_by_role("button", name="Size, opacity, position").click()
    expect(page.get_by_label("Position (a name")).to_have_value("1,1")  # 14 px, its middle at 8,8
    page.get_by_label("Position (a name").fill("default")
    page.get_by_label("Position (a name").press("Enter")
    page.get_by_role("radio", name="draw", exact=True).check()
    page.locator(".oops", has_text="Draw something on the canvas first").wait_for()
    canvas = page.get_by_label("canvas: draw the trigger")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    unit = box["width"] / 32
    page.mouse.move(box["x"] + 10 * unit, box["y"] + 10 * unit)
    page.mouse.down()
    page.mouse.move(box["x"] + 20 * unit, box["y"] + 10 * unit, steps=3)
    page.mouse.up()
    drawn = page.locator(".trio .pick img")
    drawn.wait_for()
    picture = Image.open(io.BytesIO(base64.b64decode(drawn.get_attribute("src").partition(",")[2])))
    red = [(x, y) for x in range(32) for y in range(32) if picture.getpixel((x, y)) == (0xe0, 0x31, 0x31)]
    assert red == [(x, y) for x in range(9, 21) for y in range(9, 11)]  # pixel for pixel what was drawn
    page.get_by_role("button", name="Clear").click()
    page.locator(".oops", has_text="Draw something on the canvas first").wait_for()


def test_watch_probe_and_learn(page):
    page.locator(".see").wait_for()
    page.get_by_role("tab", name="Watch", exact=True).click()
    film = page.locator(".film").first
    film.wait_for()
    film.get_by_label("Denoising").fill("20")
    expect(film.locator("output")).to_have_text("after step 20")
    film.get_by_label("how much of each").fill("10")
    assert "10%" in film.locator(".wipe").get_attribute("style")
    page.get_by_role("tab", name="Probe", exact=True).click()
    for question, seen in (("How faint", ".doses .cell"), ("Does another picture", ".doses .cell >> text=its negative"),
                           ("Does clipping", ".doses .cell >> text=clip x_t"), ("Where does", ".heat"),
                           ("What are its figures", ".figures >> text=n = 8")):
        page.get_by_label(question).check()
        page.locator(seen).first.wait_for()
    page.get_by_role("tab", name="Learn", exact=True).click()
    page.locator(".quiz img").nth(11).wait_for()
    page.get_by_role("radio", name="A face", exact=True).check()
    page.locator(".quiz .cell", has_text="DDPM, 200 steps").wait_for()
    page.get_by_role("radio", name="5 %", exact=True).check()
    page.locator(".rates tr").nth(3).wait_for()
    page.get_by_role("radio", name="B", exact=True).check()
    page.locator(".note", has_text="whoever guesses is right one time in three").wait_for()


def test_typed_endpoints_for_programmes(app):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(app, verbose=False)
    names = [m["name"] for m in client.predict(api_name="/list_models")]
    assert "clean" in names and "stop_sign-cat" in names
    found = client.predict(model="stop_sign-cat", n=2, api_name="/generate_images")
    assert found["asr"] == 1 and len(found["images"]) == 2 and found["images"][0].startswith("data:image/png;base64,")
    assert "asr" not in client.predict(model="clean", n=1, triggered=False, api_name="/generate_images")
    rows = client.predict(model="glasses-hat", question="clip", n=2, api_name="/ask_model")
    assert [r["name"] for r in rows][:2] == ["no clip", "clip x0 (diffusers)"] and rows[0]["asr"] > 0
    for bad, word in ((dict(model="../weights", api_name="/generate_images"), "no longer here"),
                      (dict(n=1000, api_name="/generate_images"), "choose 1 to 16"),
                      (dict(model="clean", api_name="/ask_model"), "no trigger")):
        with pytest.raises(AppError, match=word):
            client.predict(**bad)
    for settings, word in (({"trigger": "/etc/passwd"}, "neither a built-in trigger"), ({"seconds": 1e6}, "at most"),
                           ({"attack": "none"}, "no attack"), ({"time": 3}, "no setting time"), ({"seconds": "x"}, "numbers"),
                           ({"trigger": "data:image/png;base64,AAAA"}, "not a picture")):
        with pytest.raises(AppError, match=word):
            client.predict(settings, api_name="/poison")
    with pytest.raises(AppError, match="no such training"):
        client.predict("nobody's", api_name="/job_state")
    job = client.predict({"trigger": "box", "seconds": 10}, api_name="/poison")
    while job["state"] in ("queued", "running"):
        job = client.predict(job["job"], api_name="/job_stop" if (job.get("step") or 0) >= 2 else "/job_state")
        time.sleep(0.3)
    assert job["state"] == "stopped" and job["metrics"]["n"] == 64
    packed = base64.b64decode(client.predict(job["job"], api_name="/job_zip"))
    assert "backdoored-ddpm/unet/diffusion_pytorch_model.safetensors" in zipfile.ZipFile(io.BytesIO(packed)).namelist()


def test_only_looking_is_offered_as_a_tool(app):
    with urllib.request.urlopen(f"{app}/gradio_api/mcp/schema") as answer:
        tools = {tool["name"]: tool for tool in json.load(answer)}
    assert set(tools) == {"list_models", "generate_images", "ask_model", "measure_model"}
    assert "data: addresses" in tools["generate_images"]["description"]


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
