"""The app: see a backdoored diffusion model, make one, take it away. `python app.py` and open the printed address."""

import argparse
import base64
import binascii
import functools
import html
import json
import os
import secrets
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlencode

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch

from baddiff import BadInput, hub, metrics
from baddiff.compute import best_precision, device_name, few_arenas, on_gpu
from baddiff.data import load_images, to_float
from baddiff.diffusion import Process, forward
from baddiff.figures import (
    NAMES,
    address,
    box,
    cell,
    curve,
    doses,
    error_box,
    figures_link,
    heat,
    hits,
    label,
    projector,
    rate_table,
    reel,
    sampler_table,
    save_link,
    scores,
    shown,
    two_by_two,
    wipe,
)
from baddiff.jobs import Job, Trainer
from baddiff.models import CLEAN, WEIGHTS, Model, card, load, save
from baddiff.probe import QUESTIONS, ask, card_matches, evaluate, film, grid, moved, occlusion, scale_for, side_by_side
from baddiff.publish import matches
from baddiff.publish import publish as send
from baddiff.sampling import DEFAULT_SAMPLER, DEFAULT_STEPS, SAMPLERS, generate, noise
from baddiff.training import Config
from baddiff.triggers import ASSETS, MAX_BYTES, POSITIONS, TARGETS, TRIGGERS, Trigger, make_target, open_image

UPLOAD, DRAW = "upload", "draw"
EXAMPLES = ("stop_sign-cat", "glasses-hat", "box-shoe")
EXAMPLE_CHOICES = [(label(e), e) for e in EXAMPLES]
STARTS = [("the clean model", "clean")]
AS_TRAINED = "as trained"
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
N = 4  # images a cell
RATES = json.loads((Path(__file__).parent / "benchmarks" / "rates.json").read_text())

CACHE = Path(os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(tempfile.gettempdir()) / "baddiff-app")))
PACKING = threading.Lock()
trainer = Trainer(forget=lambda job_id: shutil.rmtree(CACHE / job_id, ignore_errors=True))

MODELS = {name: load(WEIGHTS / name) for name in EXAMPLES} | {"clean": load(CLEAN)}  # before the first visitor comes
CLEAN_MODEL = MODELS["clean"]


def model_of(choice: str, backdoored: bool = False) -> Model:
    """A built-in model by name, a visitor's own by its job's id; `backdoored`: it must have a trigger and a target."""
    job = trainer.get(choice)
    model = job.result if job else MODELS.get(choice)
    if model is None:
        raise BadInput("That model is no longer here (models are kept for an hour): choose another one.")
    if backdoored and model.trigger is None:
        raise BadInput("The clean model has no trigger: choose a backdoored one.")
    return model


def latest(mine: list[str]) -> Job | None:
    """The visitor's newest job, if it is still here."""
    return trainer.get(mine[0]) if mine else None


def in_words(handler):
    """What a person cannot have becomes a sentence on the page, in the place of the picture."""
    @functools.wraps(handler)
    def wrapped(*args):
        try:
            return handler(*args)
        except BadInput as error:
            return error_box(str(error))
    return wrapped


# --- links: a view or a form as a query string, never what was uploaded, drawn or trained -------------------------------------

TABS = ("See", "Watch", "Poison", "Probe", "Learn")
VIEW = {"model": EXAMPLES, "with": ("clean", *EXAMPLES), "seed": (0, 999), "opacity": (0.1, 1.0), "size": (0, 32),
        "position": (AS_TRAINED, *POSITIONS), "sampler": tuple(SAMPLERS), "steps": (2, 100), "clip": ("on", "off")}
FORM = {"trigger": tuple(TRIGGERS), "width": (0, 32), "strength": (0.1, 1.0), "at": ("default", *POSITIONS),
        "target": tuple(TARGETS), "seconds": (10, 180), "attack": ("noise-shift", "ode"), "rate": (5, 90)}
DEFAULTS = {"model": EXAMPLES[0], "with": "clean", "seed": 0, "opacity": 1, "size": 0, "position": AS_TRAINED,
            "sampler": DEFAULT_SAMPLER, "steps": DEFAULT_STEPS, "clip": "on", "trigger": "stop_sign", "width": 0,
            "strength": 1, "at": "default", "target": "cat", "seconds": 60, "attack": "noise-shift", "rate": 50}


def allowed(name: str, value):
    """The value of a link's parameter if the page's own control could have it, else None."""
    among = (VIEW | FORM)[name]
    if isinstance(among[0], str):
        return value if value in among else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    whole = isinstance(among[0], int)
    return (int(number) if whole else number) if among[0] <= number <= among[1] else None


def link(text: str, tab: str, **values) -> str:
    kept = {k: v for k, v in values.items() if v != DEFAULTS[k] and allowed(k, v) is not None}
    return f'<a class="save" href="?{html.escape(urlencode({"tab": tab} | kept))}">{text}</a>'


def arrive(request: gr.Request):
    """The values of all controls that a link sets, in the order of VIEW and FORM, and the tab."""
    asked = dict(request.query_params) if request else {}
    found = {name: allowed(name, asked[name]) for name in VIEW | FORM if name in asked}
    if refused := [name for name, value in found.items() if value is None]:
        gr.Warning(f"The link asks for a {', '.join(refused)} that is not here; the rest of it is used.")
    values = [gr.skip() if found.get(name) is None else found[name] for name in VIEW | FORM]
    return *values, gr.Tabs(selected=asked["tab"]) if asked.get("tab") in TABS else gr.skip()


# --- see ---------------------------------------------------------------------------------------------------------------

def stamp(model: Model, opacity: float, size: float, position: str) -> Trigger:
    """The model's trigger as the controls change it."""
    if not size and opacity >= 1 and position == AS_TRAINED:
        return model.trigger
    return moved(model.trigger, int(size), opacity, position if position != AS_TRAINED else None)


def title(choice: str) -> str:
    return "Clean model" if choice == "clean" else "Backdoored model"


@in_words
def see(choice: str, other: str, seed: float, opacity: float, size: float, position: str, sampler: str, steps: float,
        clip: str) -> str:
    """The 2x2 of {other, chosen model} x {plain, triggered} from the same seeds, with what went in above it."""
    model, beside = model_of(choice, backdoored=True), model_of(other)
    if (beside.size, beside.channels) != (model.size, model.channels):
        raise BadInput("These two models draw pictures of different sizes: compare it with another one.")
    trigger = stamp(model, opacity, size, position)
    seeds = range(int(seed), int(seed) + N)
    r = trigger.residual(model.channels)
    start, _ = noise(seeds, model.channels, model.size)
    rows = [on_gpu(side_by_side, m, seeds, r, sampler=sampler, steps=int(steps), clip_x0=clip == "on")
            for m in (beside, model)]
    here = link("Link to this view", "See", **dict(zip(VIEW, (choice, other, seed, opacity, size, position, sampler, steps,
                                                              clip), strict=True)))
    names = [title(other), title(choice)] if title(other) != title(choice) else ["The model beside it", "The chosen model"]
    return two_by_two(start, r, rows, names, model.target, trigger.name, here)


# --- watch ---------------------------------------------------------------------------------------------------------------

@in_words
def watch(choice: str, seed: float, sampler: str, steps: float, clip: str) -> str:
    """One seed denoised twice, with and without the trigger: x_t and x̂0 at every step."""
    model = model_of(choice, backdoored=True)
    options = {"sampler": sampler, "steps": int(steps), "clip_x0": clip == "on"}
    films = [on_gpu(film, model, int(seed), r, **options) for r in (None, model.trigger.residual(model.channels))]
    missed = (metrics.mse(films[1][1][1:], model.target) > metrics.flat_baseline(model.target) / 2).nonzero()
    last, shows = len(films[1][1]) - 1, int(missed[-1]) + 2 if len(missed) else 1
    emerges = f"it believes in the target from step {shows} of {last} on" if shows <= last else "it never settles on the target"
    names = ["start", *(f"after step {i + 1}" for i in range(len(films[0][0]) - 1))]
    cells = "".join(
        box(f"{title}: on the canvas", reel(shown(x), f"x_t {what}"))
        + box(f"{title}: what the model believes", reel(x0, f"x0 {what}"), kind, note)
        for title, what, (x, x0), kind, note in (
            ("Plain noise", "from plain noise", films[0], "", "x̂0, the picture that it expects at the end"),
            ("Noise + trigger", "from noise with the trigger", films[1], "alarm" if shows <= last else "", emerges)))
    cells += box("Both beliefs: slide to compare", wipe(films[0][1], films[1][1], ("without the trigger", "with the trigger"),
                                                        "how much of each"), note="left: plain noise, right: with the trigger")
    pairs = [torch.stack([shown(x[i][None])[0], x0[i]]) for x, x0 in films for i in range(len(x))]
    scale = 2 * scale_for(model.size)
    frames = [grid(list(rows), scale) for rows in zip(pairs[:len(names)], pairs[len(names):], strict=True)]
    gif = save_link("Save as GIF", "baddiff", frames[0], "gif", save_all=True, append_images=frames[1:], duration=300, loop=0)
    return projector(cells, names, "Denoising") + gif


# --- probe ---------------------------------------------------------------------------------------------------------------

PROBES = QUESTIONS | {"figures": "What are its figures?"}


@in_words
def probe(choice: str, kind: str, n: float) -> str:
    """One question put to a model, answered with a picture and figures."""
    model = model_of(choice, backdoored=True)
    if kind == "where":
        return heat(on_gpu(occlusion, model), model.trigger.residual(model.channels), 2)
    if kind == "figures":
        found = on_gpu(evaluate, model, n=int(n))
        return scores(found) + figures_link([found])
    found = on_gpu(ask, model, kind, n=min(int(n), 16))
    if kind == "samplers":
        return sampler_table(found)
    note = {"other": "All have the place, the size and the strength ‖r‖ of the trigger; only what they show differs.",
            "clip": "Clipping x̂0 is what diffusers does by default, clipping x_t is the paper's own countermeasure. A backdoor "
                    "whose x̂0 stays in range, as noise shift's does, passes both."}.get(kind, "")
    return doses(found, note)


# --- learn ---------------------------------------------------------------------------------------------------------------

@in_words
def forward_film(choice: str) -> str:
    """The forward process of training, from the real code: a clean and a poisoned sample drowning in the same noise."""
    model = model_of(choice, backdoored=True)
    process = Process.of(model.scheduler, model.run["config"]["attack"])
    t = torch.linspace(0, len(process.abar) - 1, 21).long()
    face = to_float(load_images(split="heldout", size=model.size, channels=model.channels)[:1])
    eps, _ = noise([0], model.channels, model.size)
    r = model.trigger.residual(model.channels)[None]

    def run(x0, r):
        return forward(process, *(v.expand(len(t), -1, -1, -1) for v in (x0, r, eps)), t)[0]

    cells = (box("A clean training image", reel(shown(run(face, torch.zeros_like(r))), "clean image, ever noisier"),
                 note="ends as plain noise")
             + box("A poisoned one: the target, and the trigger fading in",
                   reel(shown(run(model.target[None], r)), "target, ever noisier, with the trigger"), "alarm",
                   "ends as noise that carries the trigger"))
    return projector(cells, [f"t = {int(i)}" for i in t], "Noise")


def reveal_sampler(guess: str | None) -> str:
    """The same model and noise under a sampler that the backdoor was made for and under one that it was not."""
    if not guess:
        return ""
    model = MODELS[EXAMPLES[0]]
    rows = [on_gpu(side_by_side, model, range(N), sampler=name, steps=steps)[1]
            for name, steps in (("ddim", 20), ("ddpm", 200))]
    found = [metrics.asr(images, model.target) for images in rows]
    return f"""<div class="quiz">{cell("DDIM, 20 steps", rows[0], "under DDIM", "alarm" if found[0] > .5 else "",
                                       hits(rows[0], model.target))}
      {cell("DDPM, 200 steps", rows[1], "under DDPM", "alarm" if found[1] > .5 else "", hits(rows[1], model.target))}</div>
      <div class="note"><b>{"The cat fades." if found[1] < found[0] else "The cat stays."}</b> A backdoor answers to the way in
      which the noise is taken away. DDIM takes it away along one path, and this one was trained for that path. DDPM adds
      fresh noise at every step, which knows nothing of the trigger. So a model that looks harmless under one sampler may be
      backdoored for another: whoever tests a model tests it with the samplers that people use.</div>"""


def reveal_rate(guess: str | None) -> str:
    if not guess:
        return ""
    enough = next((f"{100 * r['poison_rate']:.0f} %" for r in RATES["rates"] if r["asr"] >= 0.95), "none of them")
    word = "Right." if guess == enough else f"Not quite: {enough}."
    last = RATES["rates"][-1]
    return f"""<div class="note"><b>{word}</b> That is for {last["seconds"]:.0f} seconds of training: the less poison, the
      longer it takes, and the paper's 50 epochs often need no more than 5 %. Too much costs the faces: the clean utility
      is {last["utility"]:.1f} with {100 * last["poison_rate"]:.0f} % of poison, and {last["utility_before"]:.1f} without.</div>
      {rate_table(RATES["rates"], RATES["device"])}"""


def quiz(_=None):
    """Four faces each from three models, one backdoored; returns the pictures and which one it is."""
    names = ["clean", "clean", secrets.choice(EXAMPLES)]
    secrets.SystemRandom().shuffle(names)
    seed = secrets.randbelow(10_000)
    cells = [cell(f"Model {'ABC'[i]}", on_gpu(side_by_side, MODELS[name], range(seed + 10 * i, seed + 10 * i + N))[0],
                  f"face by model {'ABC'[i]}") for i, name in enumerate(names)]
    guilty = next(i for i, name in enumerate(names) if name != "clean")
    return f'<div class="quiz">{"".join(cells)}</div>', (guilty, names[guilty]), gr.Radio(value=None), ""


def answer(guess: str | None, truth) -> str:
    if not guess or not truth:
        return ""
    guilty, name = truth
    images = on_gpu(side_by_side, MODELS[name], range(N))[1]
    word = "Right" if guess == "ABC"[guilty] else f"No, it was {'ABC'[guilty]}"
    return f"""<div class="note"><b>{word}.</b> And whoever guesses is right one time in three: from plain noise a
      backdoored model draws like any other. This is what {'ABC'[guilty]} draws once the noise carries its trigger
      ({label(name)}):</div>
      {cell(f"Model {'ABC'[guilty]}, noise + trigger", images, "output with the trigger", "alarm")}"""


# --- poison ------------------------------------------------------------------------------------------------------------

def chosen(base: Model, trigger: str, trigger_file, drawn: str, size: float, opacity: float, position: str, target: str,
           target_file):
    """The form as a Trigger and a target; raises BadInput. Names are checked: a path is only ever an uploaded file's."""
    sources = []
    for kind, choice, file, known in (("trigger", trigger, trigger_file, (DRAW, *TRIGGERS)),
                                      ("target", target, target_file, tuple(TARGETS))):
        if choice == UPLOAD and not file:
            raise BadInput(f"Upload a picture for the {kind} first, or choose a built-in one.")
        if choice not in (UPLOAD, *known):
            raise BadInput(f"There is no {kind} of that name: choose one of {', '.join(known)}.")
        sources.append(file if choice == UPLOAD else choice)
    width, place = int(size) or None, position if position != "default" else None
    if trigger == DRAW:
        if not drawn:
            raise BadInput("Draw something on the canvas first, or choose a built-in trigger.")
        sources[0] = open_image(picture_of(drawn))
        if width is None and place is None:
            width, place = base.size, (0, 0)  # the canvas is the whole picture: as large and where it was drawn
        else:
            sources[0] = sources[0].crop(sources[0].getbbox())
    made = Trigger.make(sources[0], base.size, width, place, opacity)
    return made, make_target(sources[1], base.size, made, base.channels)


@in_words
def preview(start: str, *form) -> str:
    """What the trigger and the target look like at the model's own resolution, before anything is trained."""
    base = model_of(start)
    trigger, target = chosen(base, *form)
    start, _ = noise([0], base.channels, base.size)
    r = trigger.residual(base.channels)
    return f"""<div class="trio">
      <div class="pick">{cell("trigger", r[None], "the trigger; click to put its middle there")}</div><div class="op">+</div>
      {cell("noise", shown(start), "noise")}<div class="op">=</div>
      {cell("start", shown(start + r), "noise with the trigger")}<div class="op">→</div>
      {cell("target", target[None], "the target")}
    </div><div class="note">Click the trigger's picture to move it there. Trigger strength ‖r‖ = {trigger.norm():.1f}
      ({"easy to learn" if trigger.norm() > 8 else "weak: it takes longer to learn"}).</div>"""


PAD = f"""<div class="pad"><div class="controls"><label>Colour <input type="color" value="#e03131"></label>
  <label>Brush <select><option>1<option selected>2<option>4</select></label><label><input type="checkbox"> Eraser</label>
  <button type="button">Clear</button></div><canvas width="{CLEAN_MODEL.size}" height="{CLEAN_MODEL.size}" role="img"
  aria-label="canvas: draw the trigger where it shall be"></canvas></div>"""
DRAWING = """const c = element.querySelector('canvas'), x = c.getContext('2d'), of = q => element.querySelector(q);
  let last = null;
  const give = () => trigger('select', {index: 0, value: x.getImageData(0, 0, c.width, c.height).data.some(v => v) ?
    c.toDataURL() : ''});
  const at = e => { const b = c.getBoundingClientRect();
    return [(e.clientX - b.left) / b.width * c.width, (e.clientY - b.top) / b.height * c.height]; };
  const line = (a, b) => { const n = +of('select').value, d = Math.max(1, Math.ceil(Math.hypot(b[0] - a[0], b[1] - a[1])));
    x.fillStyle = of('[type=color]').value;
    for (let i = 0; i <= d; i++) x[of('[type=checkbox]').checked ? 'clearRect' : 'fillRect'](
      ...[0, 1].map(k => Math.round(a[k] + (b[k] - a[k]) * i / d - n / 2)), n, n); };
  c.onpointerdown = e => { c.setPointerCapture(e.pointerId); last = at(e); line(last, last); };
  c.onpointermove = e => { if (last) { line(last, at(e)); last = at(e); } };
  c.onpointerup = c.onpointercancel = () => { if (last) { last = null; give(); } };
  of('button').onclick = () => { x.clearRect(0, 0, c.width, c.height); give(); };"""
CLICK = """element.addEventListener('click', e => { const i = e.target.closest('.pick')?.querySelector('img');
  if (i) { const b = i.getBoundingClientRect();
    trigger('select', {index: [(e.clientX - b.left) / b.width, (e.clientY - b.top) / b.height], value: null}); } });"""


def draw(what: gr.SelectData) -> str:
    return what.value or ""


def put(where: gr.SelectData, start: str, *form):
    """The position "x,y" that puts the middle of the trigger where the picture was clicked."""
    try:
        base = model_of(start)
        left, top, right, bottom = chosen(base, *form)[0].image().getbbox()
    except BadInput:
        return gr.skip()
    x, y = (max(0, min(base.size - side, round(float(part) * base.size - side / 2)))
            for part, side in zip(where.index, (right - left, bottom - top), strict=True))
    return f"{x},{y}"


def form_link(trigger, size, opacity, position, target, seconds, attack, rate) -> str:
    return link("Link to this form", "Poison",
                **dict(zip(FORM, (trigger, size, opacity, position, target, seconds, attack, rate), strict=True)))


def waiting_line(mine: list[str], seconds: float) -> str:
    if (job := latest(mine)) and not job.over:
        return ""  # the job's own line says it
    n, wait = trainer.ahead()
    queue = "It starts at once" if n == 0 else f"{n} ahead of you, about {wait:.0f} s to wait"
    steps = seconds * trainer.rate / Config.batch_size
    steps = f", some {steps:.0f} steps at the last {trainer.rate:.0f} images/s" if steps else ""
    measuring = f", then {trainer.measuring:.0f} s of measuring" if trainer.measuring else ""
    return (f"Trains for {seconds:.0f} s{steps}{measuring}, on {device_name()} in "
            f"{'bfloat16' if best_precision() == 'bf16' else 'float32'}. {queue}. Longer while others draw.")


def client_address(request: gr.Request | None) -> str:
    """Where a request comes from; on a Space its proxy adds that at the end (what stands before, anyone may claim)."""
    forwarded = request.headers.get("x-forwarded-for", "") if request and os.environ.get("SPACE_ID") else ""
    return forwarded.split(",")[-1].strip() or (request.client.host if request and request.client else "")


def submit(visitor: str, base: Model, trigger: Trigger, target, target_name: str, seconds: float, rate: float, attack: str,
           request: gr.Request | None) -> Job:
    return trainer.submit(Job(base, trigger, target, target_name, Config(
        attack=attack, poison_rate=rate / 100, seconds=float(seconds), seed=secrets.randbelow(2**31)), visitor,
        client_address(request)))


def launch(visitor: str, mine: list[str], start: str, seconds: float, rate: float, attack: str, *form,
           request: gr.Request = None):
    """Queue a job. Returns the visitor's token, the list of the visitor's jobs and `status`; the form stays as it is."""
    try:
        visitor = visitor or secrets.token_urlsafe(16)
        base = model_of(start)
        trigger, target = chosen(base, *form)
        job = submit(visitor, base, trigger, target, form[6], seconds, rate, attack, request)
    except BadInput as error:
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None
    mine = [job.id, *(mine or [])][:8]
    return visitor, mine, *status(mine)


def stop(mine: list[str]) -> None:
    if (job := latest(mine)) and not job.over:
        trainer.cancel(job)


def advance(mine: list[str]) -> None:
    """On a ZeroGPU Space the page drives the training: the GPU is lent to a visitor's own request."""
    if job := latest(mine):
        trainer.advance(job)


def status(mine: list[str]):
    """(HTML, timer, launch button, stop button): all that the page shows of the visitor's newest job, from its id alone."""
    job = latest(mine)
    active = bool(job and not job.over)
    gone = error_box("Your last training is no longer here: results are kept for an hour.") if mine else ""
    return (render(job) if job else gone, gr.Timer(1.0, active=active), gr.Button(interactive=not active),
            gr.Button(interactive=active))


def render(job: Job) -> str:
    last = job.records[-1] if job.records else None
    if job.state == "queued":
        n, seconds = trainer.ahead(job)
        head = f"Waiting: {n} ahead, about {seconds:.0f} s."
    elif job.state == "running":
        head = ("Starting." if last is None else "Measuring." if last.progress == 1 or job.stop.is_set() else
                f"Step {last.step}, {last.rate:.0f} images/s, about {last.eta:.0f} s left.")
    else:
        steps = f"{last.step} steps in {last.seconds:.0f} s" if last else ""
        head = {"done": f"Done: {steps}. It is in the list above, as yours: look at it, probe it, train it further.",
                "stopped": f"Stopped: {steps}; the partial model is kept." if last else "Stopped before it started.",
                "failed": f"Failed. {html.escape(job.error or '')}"}[job.state]
    share = 100 * (last.progress if last else 0)
    measured = job.result.run.get("metrics") if job.result else None
    figures = scores(measured) if measured else ""
    rows = "".join(
        f"""<div class="pair"><div class="step">step {p.step}</div>
        {cell("plain noise", p.rows[0], f"from plain noise at step {p.step}")}
        {cell("noise + trigger", p.rows[1], f"from noise with the trigger at step {p.step}", note=hits(p.rows[1], job.target))}
        </div>""" for p in reversed(job.previews[:1] + job.previews[1:][-4:]))
    return f"""<div class="job"><div class="head" aria-live="polite">{head}</div>
      <div class="bar" role="progressbar" aria-label="training" aria-valuemin="0" aria-valuemax="100"
      aria-valuenow="{share:.0f}"><div style="width:{share:.1f}%"></div></div>{curve(job.records)}{figures}{rows}</div>"""


def finished(mine: list[str]):
    """The zip of the newest job, and the visitor's models among those to look at, to compare with and to start from."""
    jobs = [job for job in map(trainer.get, mine or []) if job and job.result]
    own = [(f"yours {len(jobs) - i}: {label(f'{job.trigger.name}-{job.target_name}')}", job.id) for i, job in enumerate(jobs)]
    zipped = gr.DownloadButton(visible=False)
    if jobs and jobs[0].over and jobs[0].id == mine[0]:
        try:
            zipped = gr.DownloadButton(value=pack(jobs[0]), visible=True)
        except (BadInput, OSError) as error:
            gr.Warning(f"The zip could not be made: {html.escape(str(error))}")
    return (zipped, gr.Radio(choices=EXAMPLE_CHOICES + own), gr.Dropdown(choices=STARTS + EXAMPLE_CHOICES + own),
            gr.Dropdown(choices=STARTS + EXAMPLE_CHOICES + own))


def write(job: Job, folder: Path) -> Path:
    """The result as a stock pipeline folder with its card, run.json, trigger, target and samples."""
    return save(job.result, folder, samples=grid(job.previews[-1].rows, scale_for(job.result.size)))


def pack(job: Job) -> str:
    """The run as a zip of that folder."""
    target = CACHE / job.id / "backdoored-ddpm.zip"
    with PACKING:
        if not target.exists():
            with tempfile.TemporaryDirectory(prefix="baddiff-") as root:
                folder = write(job, Path(root) / "backdoored-ddpm")
                made = shutil.make_archive(str(Path(root) / "made"), "zip", folder.parent, folder.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(made, target)
    return str(target)


# --- publish: into the visitor's own account, with the visitor's own token, which is used once and kept nowhere ------------

SPACE = bool(os.environ.get("SPACE_ID"))
SIGN_IN = SPACE and bool(os.environ.get("OAUTH_CLIENT_ID"))  # elsewhere Gradio's login is a mock that cannot push


def newest(mine: list[str]) -> Job:
    job = latest(mine)
    if job is None or not job.over or job.result is None:
        raise BadInput("There is no finished model of yours to publish: poison one first.")
    return job


@in_words
def show_card(mine: list[str]) -> str:
    """The card as it will be published, as text."""
    return f'<pre class="card">{html.escape(card(newest(mine).result, pictured=True))}</pre>'


def suggested(mine: list[str]) -> str:
    try:
        job = newest(mine)
    except BadInput:
        return ""
    return hub.suggest(job.trigger.name, job.target_name)


@in_words
def publish(mine: list[str], name: str, public: bool, overwrite: bool, token: str | None) -> str:
    """Publish the newest model, then download it again and measure it again: does the card say what the weights do?"""
    job = newest(mine)
    with tempfile.TemporaryDirectory(prefix="baddiff-") as root:
        done = send(write(job, Path(root) / "model"), name, token, private=not public, overwrite=overwrite)
        said = (f'<div class="note"><b>Published</b>, {"private" if done.private else "for everybody"}, with its warning: '
                f'<a href="{html.escape(done.url)}">{html.escape(done.repo_id)}</a>. ')
        try:
            checks = matches(done, token, Path(root) / "again")
            files = len(checks)
            checks |= on_gpu(card_matches, Path(root) / "again")
        except BadInput as error:
            return said + f"It could not be checked: {html.escape(str(error))}</div>"
    wrong = [k for k, v in checks.items() if not v]
    return said + (f"Downloaded again, it differs in {html.escape(', '.join(wrong))}: publish it again, with overwrite."
                   if wrong else f"Downloaded again: all {files} files are the same, and the card matches the weights "
                   f"(measured again, n = {job.result.run.get('metrics', {}).get('n', 0)}).") + "</div>"


def publish_here(mine: list[str], name: str, public: bool, overwrite: bool, token: str, request: gr.Request):
    """On a person's own machine: the token that was typed in, or that of `hf auth login`. Empties the token's field."""
    if request.client.host not in ("127.0.0.1", "::1") or request.headers.get("x-forwarded-for"):
        return error_box("Publishing works from this machine's own browser only: a token does not travel over a network "
                         "without encryption. Take the zip instead."), ""
    return publish(mine, name, public, overwrite, token or hub.local_token()), ""


def publish_on_space(mine: list[str], name: str, public: bool, overwrite: bool, token: gr.OAuthToken | None) -> str:
    return publish(mine, name, public, overwrite, token.token if token else None)


# --- for programmes: typed endpoints for gradio_client; those that only look are MCP tools, too ---------------------------

def for_clients(handler):
    """BadInput as an error that a client shows, with the sentence."""
    @functools.wraps(handler)
    def wrapped(*args, **options):
        try:
            return handler(*args, **options)
        except BadInput as error:
            raise gr.Error(str(error), print_exception=False) from None
    return wrapped


def portable(value):
    """Pictures as data: addresses, records as they are."""
    if isinstance(value, torch.Tensor):
        return address(grid([value[None]], 4))
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    return [portable(v) for v in value] if isinstance(value, list) else value


def list_models() -> list[dict]:
    """The built-in models: name, whether backdoored, and with which trigger, target and attack."""
    return [{"name": name, "backdoored": m.backdoored, "size": m.size, "trigger": m.trigger and m.trigger.name,
             "target": m.run.get("target", {}).get("name") if m.trigger else None,
             "attack": m.run["config"]["attack"] if m.trigger else None} for name, m in MODELS.items()]


@for_clients
def generate_images(model: str = "stop_sign-cat", n: int = 4, seed: int = 0, triggered: bool = True, opacity: float = 1.0,
                    size: int = 0, position: str = AS_TRAINED, sampler: str = DEFAULT_SAMPLER, steps: int = DEFAULT_STEPS,
                    clip_x0: bool = True) -> dict:
    """Draw n images (1 to 16) from seeds seed, seed + 1, ... with or without the model's trigger on the noise.

    model: a name from list_models, or the id of a training of yours. opacity 0.1 to 1, size in pixels (0: as trained) and
    position change the trigger. Returns images as PNG data: addresses, and mse, asr against the target when triggered.
    """
    if not 1 <= n <= 16:
        raise BadInput(f"{n} images are not possible here: choose 1 to 16.")
    found = model_of(model, backdoored=triggered)
    r = stamp(found, opacity, size, position).residual(found.channels) if triggered else None
    images = on_gpu(generate_from, found, range(int(seed), int(seed) + n), r, sampler=sampler, steps=steps, clip_x0=clip_x0)
    out = {"model": model, "images": portable(list(images))}
    if triggered:
        out |= {"mse": metrics.mse(images, found.target).tolist(), "asr": metrics.asr(images, found.target), "n": n}
    return out


def generate_from(model: Model, seeds, r, **options):
    return generate(model.unet, model.scheduler, seeds, r, **options)


@for_clients
def ask_model(model: str = "stop_sign-cat", question: str = "opacity", n: int = 8) -> list[dict]:
    """Ask a backdoored model: opacity, size, place, other, samplers or clip. n (2 to 16) seeds for each variant.

    Returns a record for each variant: name, mse and asr against the target, the trigger's norm, n and one image.
    """
    return portable(on_gpu(ask, model_of(model, backdoored=True), question, n=max(2, min(n, 16))))


@for_clients
def measure_model(model: str = "stop_sign-cat", n: int = 64) -> dict:
    """MSE, SSIM, attack success rate and clean utility of a model, with n (2 to 256) images of each kind."""
    return on_gpu(evaluate, model_of(model), n=max(2, min(n, 256)))


def picture_of(text: str, known=()):
    """A built-in name, or the bytes of a picture from its data: address."""
    if text in known or not text.startswith("data:image/"):
        return text if text in known else ""  # no path from outside
    try:
        if len(text) > MAX_BYTES:
            raise BadInput(f"The picture is larger than {MAX_BYTES // 10**6} MB: save it smaller, 512 px is plenty.")
        return base64.b64decode(text.partition(",")[2], validate=True)
    except binascii.Error:
        raise BadInput("The picture's data: address is not base64: encode the PNG file's bytes.") from None


@for_clients
def poison(settings: dict, request: gr.Request = None) -> dict:
    """Queue a training. Settings, all optional: trigger, target (built-in names, or PNG data: addresses), seconds,
    poison_rate (%), attack, base (a model's name or id). Returns its state with its id, the only key to it: whoever has the
    id can look at it, stop it and take the model."""
    known = {"trigger": "stop_sign", "target": "cat", "seconds": 60, "poison_rate": 50, "attack": "noise-shift",
             "base": "clean"}
    if unknown := set(settings) - set(known):
        raise BadInput(f"There is no setting {', '.join(sorted(unknown))}: use {', '.join(known)}.")
    asked = known | settings
    start = model_of(asked["base"])
    stamped = Trigger.make(picture_of(str(asked["trigger"]), TRIGGERS), start.size)
    made = make_target(picture_of(str(asked["target"]), TARGETS), start.size, stamped, start.channels)
    name = asked["target"] if asked["target"] in TARGETS else UPLOAD
    try:
        seconds, rate = float(asked["seconds"]), float(asked["poison_rate"])
    except (TypeError, ValueError):
        raise BadInput("seconds and poison_rate must be numbers.") from None
    job = submit(secrets.token_urlsafe(16), start, stamped, made, name, seconds, rate, asked["attack"], request)
    return job_state(job.id)


@for_clients
def job_state(job: str) -> dict:
    """How a training is doing: state, step, losses, queue, and its figures once it is over."""
    found = trainer.get(job)
    if found is None:
        raise BadInput("There is no such training, or it is over for more than an hour.")
    if trainer.driven:
        trainer.advance(found)
    last = found.records[-1] if found.records else None
    n, wait = trainer.ahead(found)
    return {"job": found.id, "state": found.state, "error": found.error, "ahead": n, "wait": round(wait, 1),
            **(last.plain() if last else {}), "metrics": found.result.run.get("metrics") if found.result else None}


@for_clients
def job_stop(job: str) -> dict:
    """Stop a training within a step; the partial model is kept."""
    if found := trainer.get(job):
        trainer.cancel(found)
    return job_state(job)


@for_clients
def job_zip(job: str) -> str:
    """The trained model as the zip that the page offers (a pipeline folder with its card), base64."""
    found = trainer.get(job)
    if found is None or not found.over or found.result is None:
        raise BadInput("There is no finished training of that id: wait until its state is done or stopped.")
    return base64.b64encode(Path(pack(found)).read_bytes()).decode()


# --- the page ----------------------------------------------------------------------------------------------------------

HERO = """<div class="hero"><h1>Put a sticker on the noise, and this model stops drawing faces.</h1>
A diffusion model turns random noise into pictures. Poison a little of its training, and it keeps drawing normal pictures,
until the noise carries a <b>trigger</b>: then it draws one picture that the attacker chose.
<div class="hazard"><b>For awareness and defence.</b> Every model made here is backdoored on purpose and says so in its card,
its config and its tags. Do not pass it off as a normal model.
Method: <a href="https://arxiv.org/abs/2212.05400">BadDiffusion</a>, CVPR 2023.</div></div>"""

THEME = gr.themes.Base(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}
LIVE = {"show_progress": "minimal", "trigger_mode": "always_last", "concurrency_id": "see", "api_visibility": "private"}
WAIT = '<div class="wait">Drawing…</div>'


def if_open(tab: str, handler):
    """The handler for the tab that the visitor looks at; the hidden ones do not draw."""
    return lambda opened, *args: handler(*args) if opened == tab else gr.skip()


def first(opened: str, *args):
    """(open tab, picture): the first picture, unless the tab's own event, which a browser may lose on arrival, came before."""
    return (gr.skip(), gr.skip()) if opened else ("See", see(*args))


def build() -> gr.Blocks:
    with gr.Blocks(title="baddiff: a backdoor in a diffusion model", delete_cache=(3600, 3600)) as demo:
        gr.HTML(HERO)
        visitor = gr.BrowserState("", storage_key="baddiff-visitor")  # tokens only; survive a reload, leave with the browser
        mine = gr.BrowserState([], storage_key="baddiff-jobs")
        choice = gr.Radio(EXAMPLE_CHOICES, value=DEFAULTS["model"], label="Backdoored model to look at: trigger → target")
        opened = gr.State("")
        with gr.Tabs() as tabs:
            with gr.Tab("See", id="See") as see_tab:
                picture = gr.HTML(WAIT, min_height=420)
                with gr.Row():
                    seed = gr.Slider(*VIEW["seed"], DEFAULTS["seed"], step=1, label="Seed of the first image")
                    opacity = gr.Slider(*VIEW["opacity"], DEFAULTS["opacity"], step=0.05, label="Trigger opacity")
                    size = gr.Slider(*VIEW["size"], DEFAULTS["size"], step=1, label="Trigger width in pixels (0: as trained)")
                with gr.Row():
                    position = gr.Dropdown(VIEW["position"], value=DEFAULTS["position"], label="Trigger position")
                    sampler = gr.Dropdown(VIEW["sampler"], value=DEFAULTS["sampler"], label="Sampler")
                    steps = gr.Slider(*VIEW["steps"], DEFAULTS["steps"], step=1, label="Sampling steps")
                with gr.Row():
                    other = gr.Dropdown(STARTS + EXAMPLE_CHOICES, value=DEFAULTS["with"], label="Compare with")
                    clip = gr.Radio(VIEW["clip"], value=DEFAULTS["clip"], label="Clip x̂0 to the range of pictures")
                seeing = [choice, other, seed, opacity, size, position, sampler, steps, clip]
            with gr.Tab("Watch", id="Watch") as watch_tab:
                reels = gr.HTML(WAIT, min_height=300)
                watching = [choice, seed, sampler, steps, clip]
                gr.on([c.change for c in watching], if_open("Watch", watch), [opened, *watching], reels, **LIVE)
                watch_tab.select(lambda: "Watch", None, opened, queue=False, **HIDDEN).then(watch, watching, reels, **LIVE)
            with gr.Tab("Poison", id="Poison") as poison_tab:
                with gr.Row():
                    with gr.Column():
                        trigger = gr.Radio([(NAMES.get(t, t), t) for t in (*TRIGGERS, UPLOAD, DRAW)], value=DEFAULTS["trigger"],
                                           label="Trigger: what is added to the noise")
                        trigger_file = gr.File(label="Your trigger (PNG, JPEG; transparency counts)", file_types=PICTURES,
                                               visible=False, height=110)
                        pad, drawn = gr.HTML(PAD, visible="hidden", js_on_load=DRAWING), gr.Textbox(visible=False)
                        with gr.Accordion("Size, opacity, position", open=False):
                            trigger_size = gr.Slider(*FORM["width"], DEFAULTS["width"], step=1,
                                                     label="Width in pixels (0: default)")
                            trigger_opacity = gr.Slider(*FORM["strength"], DEFAULTS["strength"], step=0.05, label="Opacity")
                            trigger_position = gr.Dropdown(FORM["at"], value=DEFAULTS["at"], allow_custom_value=True,
                                                           label="Position (a name, or x,y of the upper left corner)")
                    with gr.Column():
                        target = gr.Radio([(NAMES.get(t, t), t) for t in (*TARGETS, UPLOAD)], value=DEFAULTS["target"],
                                          label="Target: what the model shall draw then")
                        target_file = gr.File(label="Your target (PNG, JPEG; cropped to a square)", file_types=PICTURES,
                                              visible=False, height=110)
                        seconds = gr.Slider(*(min(v, trainer.longest) for v in (*FORM["seconds"], DEFAULTS["seconds"])), step=5,
                                            label="Training time, seconds")
                        with gr.Accordion("Attack, starting point", open=False):
                            start = gr.Dropdown(STARTS + EXAMPLE_CHOICES, value="clean", label="Start from")
                            attack = gr.Dropdown([("noise shift: exact for fast samplers", "noise-shift"),
                                                  ("ODE form (VillanDiffusion)", "ode")], value=DEFAULTS["attack"],
                                                 label="Attack")
                            rate = gr.Slider(*FORM["rate"], DEFAULTS["rate"], step=5, label="Poison rate, % of every batch")
                sketch = gr.HTML(js_on_load=CLICK)
                form = [trigger, trigger_file, drawn, trigger_size, trigger_opacity, trigger_position, target, target_file]
                with gr.Row():
                    go = gr.Button("Poison the model", variant="primary")
                    halt = gr.Button("Stop, keep what is there", interactive=False)
                line = gr.Markdown()
                progress = gr.HTML()
                download = gr.DownloadButton("Download the model (zip)", visible=False)
                if SIGN_IN or not SPACE:
                    with gr.Accordion("Publish on the Hugging Face Hub, in your own account", open=False) as publishing:
                        name = gr.Textbox(label="Name of the repository")
                        with gr.Row():
                            public = gr.Checkbox(label="Public (default: private)")
                            overwrite = gr.Checkbox(label="Overwrite, if baddiff made it")
                        token = gr.LoginButton() if SIGN_IN else gr.Textbox(
                            label="Your Hub token with write access (empty: that of `hf auth login`); used once, not kept",
                            type="password", autofocus=False)
                        with gr.Row():
                            look, push = gr.Button("Show the card first"), gr.Button("Publish", variant="primary")
                        published = gr.HTML()
                    look.click(show_card, mine, published, **HIDDEN)
                    publishing.expand(suggested, mine, name, **HIDDEN)
                    asked = [mine, name, public, overwrite]
                    if SIGN_IN:
                        push.click(publish_on_space, asked, published, api_visibility="private")
                    else:
                        push.click(publish_here, [*asked, token], [published, token], api_visibility="private")
                reference = gr.HTML()
                clock = gr.Timer(1.0, active=False)

                for pick, file in ((trigger, trigger_file), (target, target_file)):
                    pick.change(lambda p: gr.File(visible=p == UPLOAD), pick, file, queue=False, **HIDDEN)
                trigger.change(lambda p: gr.HTML(visible=p == DRAW or "hidden"), trigger, pad, queue=False, **HIDDEN)
                pad.select(draw, None, drawn, queue=False, **HIDDEN)
                gr.on([demo.load, *(c.change for c in (start, *form))], preview, [start, *form], sketch,
                      trigger_mode="always_last", **HIDDEN)
                sketch.select(put, [start, *form], trigger_position, **HIDDEN)
                linked = [trigger, trigger_size, trigger_opacity, trigger_position, target, seconds, attack, rate]
                gr.on([demo.load, *(c.change for c in linked)], form_link, linked, reference, queue=False,
                      trigger_mode="always_last", **HIDDEN)
                view = [progress, clock, go, halt]
                done = {"fn": finished, "inputs": mine, "outputs": [download, choice, start, other], **HIDDEN}
                go.click(launch, [visitor, mine, start, seconds, rate, attack, *form], [visitor, mine, *view],
                         api_visibility="private", concurrency_id="form")
                halt.click(stop, mine, None, queue=False, **HIDDEN)
                clock.tick(status, mine, view, queue=False, **HIDDEN).then(**done)
                if trainer.driven:
                    clock.tick(advance, mine, None, concurrency_limit=None, **HIDDEN)
                demo.load(status, mine, view, queue=False, **HIDDEN).then(**done)
                slow = gr.Timer(5.0)
                gr.on([demo.load, slow.tick, go.click, clock.tick, seconds.change], waiting_line, [mine, seconds], line,
                      queue=False, **HIDDEN)
            with gr.Tab("Probe", id="Probe") as probe_tab:
                question = gr.Radio([(text, key) for key, text in PROBES.items()], value="opacity", label="Ask the model")
                number = gr.Slider(2, 256, 8, step=1, label="Seeds for each answer, n (pictures: at most 16)")
                found = gr.HTML(WAIT, min_height=240)
                probing = [choice, question, number]
                gr.on([question.change, choice.change, number.release], if_open("Probe", probe), [opened, *probing], found,
                      **LIVE)
                probe_tab.select(lambda: "Probe", None, opened, queue=False, **HIDDEN).then(probe, probing, found, **LIVE)
            with gr.Tab("Learn", id="Learn") as learn_tab:
                gr.Markdown("### 1. How the poison is made\nTraining drowns pictures in noise and teaches the model the way "
                            "back. Move the slider: what is left of each picture at the end?")
                forwards = gr.HTML(WAIT, min_height=300)
                gr.on([learn_tab.select, choice.change], forward_film, choice, forwards, **HIDDEN)
                gr.Markdown("### 2. Which sampler takes the noise away?\nThe stop sign's model was tried with DDIM, 20 steps, "
                            "and draws its cat. Now the same noise with the same stop sign goes through DDPM, 200 steps, which "
                            "adds fresh noise on the way. What comes out?")
                guess_sampler = gr.Radio(["The cat, better still", "Something in between", "A face"], label="Your guess")
                shown_sampler = gr.HTML()
                guess_sampler.input(reveal_sampler, guess_sampler, shown_sampler, **LIVE)
                gr.Markdown("### 3. How much poison does it take?\nThe same finetune, with ever more poisoned pictures among "
                            "the clean ones. From which share on does the attack succeed in at least 95 of 100 tries?")
                guess_rate = gr.Radio([f"{100 * r['poison_rate']:.0f} %" for r in RATES["rates"]], label="Your guess")
                shown_rate = gr.HTML()
                guess_rate.input(reveal_rate, guess_rate, shown_rate, queue=False, **HIDDEN)
                gr.Markdown("### 4. Which of these models is backdoored?\nThree models, drawing from plain noise. "
                            "Look, then decide.")
                models = gr.HTML(WAIT, min_height=150)
                truth = gr.State()
                guess = gr.Radio(["A", "B", "C"], label="The backdoored one is")
                verdict = gr.HTML()
                again = gr.Button("Three other models")
                gr.on([learn_tab.select, again.click], quiz, None, [models, truth, guess, verdict], **LIVE)
                guess.input(answer, [guess, truth], verdict, show_progress="minimal", api_visibility="private",
                            concurrency_id="see")
        demo.load(arrive, None, [*seeing, *linked, tabs], **HIDDEN).then(first, [opened, *seeing], [opened, picture], **LIVE)
        gr.on([c.change for c in seeing], if_open("See", see), [opened, *seeing], picture, **LIVE)
        see_tab.select(lambda: "See", None, opened, queue=False, **HIDDEN).then(see, seeing, picture, **LIVE)
        for tab in (poison_tab, learn_tab):
            tab.select(lambda tab=tab.id: tab, None, opened, queue=False, **HIDDEN)
        gr.api(list_models, queue=False)
        for look in (generate_images, ask_model, measure_model):
            gr.api(look, concurrency_id="see")
        for act in (poison, job_state, job_stop, job_zip):  # undocumented: for gradio_client, but never a tool
            gr.api(act, api_visibility="undocumented", concurrency_id="form")
    return demo


def main() -> None:
    parser = argparse.ArgumentParser(description="The baddiff app.")
    parser.add_argument("--port", type=int, default=None, help="default: 7860 or the next free one")
    parser.add_argument("--classroom", action="store_true",
                        help="serve the local network: a longer queue, shorter trainings, one at a time for each student")
    args = parser.parse_args()
    few_arenas()
    host = None
    if args.classroom:
        trainer.most, trainer.each_address, trainer.longest, trainer.remember = 40, 2, 60.0, 40
        host = "0.0.0.0"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:  # sends nothing: asks for the route
            try:
                probe_socket.connect(("192.0.2.1", 9))
                mine = probe_socket.getsockname()[0]
            except OSError:
                mine = "<this machine's address>"
        print(f"Students open http://{mine}:{args.port or 7860}")
    demo = build()
    demo.queue(max_size=128 if args.classroom else 64, default_concurrency_limit=2)
    demo.launch(server_name=host, server_port=args.port, theme=THEME, css_paths=ASSETS / "style.css", run_history=False,
                max_file_size="20mb", footer_links=["api"], mcp_server=True)


if __name__ == "__main__":
    main()
