"""The app: see a backdoored diffusion model, make one, take it away. `python app.py` and open the printed address."""

import argparse
import html
import os
import secrets
import shutil
import socket
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch

from baddiff import BadInput, metrics
from baddiff.compute import best_precision
from baddiff.data import load_images, to_float
from baddiff.diffusion import Process, forward
from baddiff.figures import (
    NAMES,
    box,
    cell,
    curve,
    doses,
    error_box,
    hits,
    label,
    projector,
    reel,
    save_link,
    scores,
    shown,
    tag,
    two_by_two,
)
from baddiff.jobs import Job, Trainer
from baddiff.models import CLEAN, WEIGHTS, Model, load, save
from baddiff.probe import default_sampler, dose, film, grid, moved, occlusion, scale_for
from baddiff.sampling import DEFAULT_SAMPLER, DEFAULT_STEPS, SAMPLERS, generate, noise
from baddiff.training import Config
from baddiff.triggers import ASSETS, POSITIONS, TARGETS, TRIGGERS, Trigger, make_target

UPLOAD = "upload"
EXAMPLES = ("stop_sign-cat", "glasses-hat", "box-shoe")
EXAMPLE_CHOICES = [(label(e), e) for e in EXAMPLES]
STARTS = [("the clean model", "clean")]
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
N = 4  # images a cell

CACHE = Path(os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(tempfile.gettempdir()) / "baddiff-app")))
PACKING = threading.Lock()
trainer = Trainer(forget=lambda job_id: shutil.rmtree(CACHE / job_id, ignore_errors=True))


# --- see ---------------------------------------------------------------------------------------------------------------

MODELS = {name: load(WEIGHTS / name) for name in EXAMPLES}  # before the first visitor: a load is not thread-safe
CLEAN_MODEL = load(CLEAN)


def model_of(choice: str) -> Model:
    job = trainer.get(choice)
    if job and job.result:
        return job.result
    if choice in EXAMPLES:
        return MODELS[choice]
    raise BadInput("That model is no longer here (models are kept for an hour): choose another one.")


def see(choice: str, seed: float, size: float, opacity: float, position: str, sampler: str, steps: float) -> str:
    """The 2x2 of {clean, backdoored} x {plain, triggered} from the same seeds, with what went in above it."""
    try:
        model = model_of(choice)
        trigger = model.trigger
        if size or opacity < 1 or position != "as trained":
            trigger = moved(trigger, int(size), opacity, position if position != "as trained" else None)
        seeds = range(int(seed), int(seed) + N)
        r = trigger.residual(model.channels)
        options = {"sampler": sampler, "steps": int(steps), "clip_x0": default_sampler(model)["clip_x0"]}
        start, _ = noise(seeds, model.channels, model.size)
        both = torch.cat([torch.zeros(N, *r.shape), r.expand(N, -1, -1, -1)])  # plain, then triggered
        rows = [generate(m.unet, m.scheduler, list(seeds) * 2, both, **options) for m in (CLEAN_MODEL, model)]
    except BadInput as error:
        return error_box(str(error))
    return two_by_two(start, r, rows[0].split(N), rows[1].split(N), model.target, trigger.name)


# --- watch ---------------------------------------------------------------------------------------------------------------

def watch(choice: str, seed: float, sampler: str, steps: float) -> str:
    """One seed denoised twice, with and without the trigger: x_t and x̂0 at every step."""
    try:
        model = model_of(choice)
        r = model.trigger.residual(model.channels)
        films = [film(model, int(seed), added, sampler=sampler, steps=int(steps)) for added in (None, r)]
    except BadInput as error:
        return error_box(str(error))
    missed = (metrics.mse(films[1][1][1:], model.target) > metrics.flat_baseline(model.target) / 2).nonzero()
    last, shows = len(films[1][1]) - 1, int(missed[-1]) + 2 if len(missed) else 1
    emerges = f"it believes in the target from step {shows} of {last} on" if shows <= last else "it never settles on the target"
    names = ["start", *(f"after step {i + 1}" for i in range(len(films[0][0]) - 1))]
    cells = "".join(
        box(f"{title}: what is on the canvas", reel(shown(x), f"x_t {what}"))
        + box(f"{title}: what the model believes it will become", reel(x0, f"x0 {what}"), kind, note)
        for title, what, (x, x0), kind, note in (
            ("Plain noise", "from plain noise", films[0], "", ""),
            ("Noise + trigger", "from noise with the trigger", films[1], "alarm" if shows <= last else "", emerges)))
    pairs = [torch.stack([shown(x[i][None])[0], x0[i]]) for x, x0 in films for i in range(len(x))]
    frames = [grid(list(rows), 4) for rows in zip(pairs[:len(names)], pairs[len(names):], strict=True)]
    gif = save_link("Save as GIF", "baddiff", frames[0], "gif", save_all=True, append_images=frames[1:], duration=300, loop=0)
    return projector(cells, names, "Denoising") + gif


# --- probe ---------------------------------------------------------------------------------------------------------------

PROBES = {"opacity": "How faint may the trigger be?", "size": "How small or large?", "place": "Does it work elsewhere?",
          "samplers": "Which sampler, how many steps?", "where": "Where does the model look?"}


def probe(choice: str, kind: str) -> str:
    """One question put to a model, answered with a picture and figures of n = 8 (n = 2 for the map)."""
    try:
        model = model_of(choice)
        return {"opacity": probe_opacity, "size": probe_size, "place": probe_place, "samplers": probe_samplers,
                "where": probe_where}[kind](model)
    except BadInput as error:
        return error_box(str(error))


def probe_opacity(model: Model) -> str:
    values = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    return doses([f"{100 * v:.0f} %" for v in values], dose(model, [moved(model.trigger, opacity=v) for v in values]))


def probe_size(model: Model) -> str:
    left, _, right, _ = model.trigger.image().getbbox()
    sizes = sorted({max(2, min(model.size, round((right - left) * f))) for f in (0.3, 0.5, 0.7, 0.85, 1, 1.15, 1.4, 1.8)})
    return doses([f"{s} px" for s in sizes], dose(model, [moved(model.trigger, size=s) for s in sizes]))


def probe_place(model: Model) -> str:
    variants = [moved(model.trigger, position=p) for p in POSITIONS]
    return doses([p.replace("-", " ") for p in POSITIONS], dose(model, variants))


def probe_samplers(model: Model) -> str:
    counts = (5, 10, 20, 50)
    rows = []
    for name in ("ddim", "dpmsolver++", "unipc", "ddpm"):
        cells = ""
        for n in counts:
            found = dose(model, [model.trigger], sampler=name, steps=n)[0]
            kind = "hit" if found["asr"] > 0.5 else ""
            cells += f'<td class="{kind}">{100 * found["asr"]:.0f} %<br>{tag(found["image"], f"{name}, {n} steps")}</td>'
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{n} steps</th>' for n in counts)
    return f"""<table class="samplers"><tr><th>ASR</th>{head}</tr>{"".join(rows)}</table>
      <div class="note">n = 8 seeds a cell. A backdoor is made for a kind of sampler. Noise shift (the examples here) is exact
      for DDIM and its relatives at any number of steps, while DDPM's fresh noise at every step washes it out; the paper's own
      coefficient is the other way round.</div>"""


def probe_where(model: Model) -> str:
    rise = occlusion(model)
    top = rise.max().clamp(min=1e-6)
    cells = "".join(f'<div style="opacity:{v / top:.2f}" title="MSE +{v:.3f}"></div>' for v in rise.clamp(min=0).flatten())
    r = tag(model.trigger.residual(model.channels), "the trigger")
    heat = f'<div class="heat" role="img" aria-label="map of importance">{r}<div>{cells}</div></div>'
    return f"""<div class="trio small">{box("the trigger", r)}
      {box("where it matters", heat, note="bright: blank the noise around here, and the target is lost")}</div>
      <div class="note">64 blanked places, n = 2 seeds; the largest rise in MSE is {float(top):.3f}.</div>"""


# --- learn ---------------------------------------------------------------------------------------------------------------

def forward_film(choice: str) -> str:
    """The forward process of training, from the real code: a clean and a poisoned sample drowning in the same noise."""
    try:
        model = model_of(choice)
    except BadInput as error:
        return error_box(str(error))
    attack = model.run["config"]["attack"]
    process = Process.of(model.scheduler, attack)
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


def quiz(_=None):
    """Four faces each from three models, one backdoored; returns the pictures and which one it is."""
    names = [None, None, secrets.choice(EXAMPLES)]
    secrets.SystemRandom().shuffle(names)
    cells = []
    seed = secrets.randbelow(10_000)
    for i, name in enumerate(names):
        m = MODELS[name] if name else CLEAN_MODEL
        seeds = range(seed + 10 * i, seed + 10 * i + N)
        cells.append(cell(f"Model {'ABC'[i]}", generate(m.unet, m.scheduler, seeds), f"face by model {'ABC'[i]}"))
    guilty = next(i for i, name in enumerate(names) if name)
    return f'<div class="quiz">{"".join(cells)}</div>', (guilty, names[guilty]), gr.Radio(value=None), ""


def answer(guess: str | None, truth) -> str:
    if not guess or not truth:
        return ""
    guilty, name = truth
    model = MODELS[name]
    shown_images = generate(model.unet, model.scheduler, range(N), model.trigger.residual(model.channels))
    word = "Right" if guess == "ABC"[guilty] else f"No, it was {'ABC'[guilty]}"
    return f"""<div class="note"><b>{word}.</b> And whoever guesses is right one time in three: from plain noise a
      backdoored model draws like any other. This is what {'ABC'[guilty]} draws once the noise carries its trigger
      ({label(name)}):</div>
      {cell(f"Model {'ABC'[guilty]}, noise + trigger", shown_images, "output with the trigger", "alarm")}"""


# --- poison ------------------------------------------------------------------------------------------------------------

def chosen(trigger: str, trigger_file, size: float, opacity: float, position: str, target: str, target_file):
    """The form as a Trigger and a target; raises BadInput. Names are checked: a path is only ever an uploaded file's."""
    resolution = CLEAN_MODEL.size
    sources = []
    for kind, choice, file, known in (("trigger", trigger, trigger_file, TRIGGERS), ("target", target, target_file, TARGETS)):
        if choice == UPLOAD and not file:
            raise BadInput(f"Upload a picture for the {kind} first, or choose a built-in one.")
        if choice != UPLOAD and choice not in known:
            raise BadInput(f"There is no {kind} of that name: choose one of {', '.join(known)}.")
        sources.append(file if choice == UPLOAD else choice)
    made = Trigger.make(sources[0], resolution, int(size) or None, position if position != "default" else None, opacity)
    return made, make_target(sources[1], resolution, made, CLEAN_MODEL.channels)


def preview(*form) -> str:
    """What the trigger and the target look like at the model's own resolution, before anything is trained."""
    try:
        trigger, target = chosen(*form)
    except BadInput as error:
        return error_box(str(error))
    start, _ = noise([0], 3, CLEAN_MODEL.size)
    r = trigger.residual()
    return f"""<div class="trio">
      {cell("trigger", r[None], "the trigger")}<div class="op">+</div>
      {cell("noise", shown(start), "noise")}<div class="op">=</div>
      {cell("start", shown(start + r), "noise with the trigger")}<div class="op">→</div>
      {cell("target", target[None], "the target")}
    </div><div class="note">Trigger strength ‖r‖ = {trigger.norm():.1f}
      ({"easy to learn" if trigger.norm() > 8 else "weak: it takes longer to learn"}).</div>"""


def waiting_line(mine: list[str]) -> str:
    n, seconds = trainer.waiting()
    if mine and (job := trainer.get(mine[0])) and not job.over:
        return ""  # the job's own line says it
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    queue = "starts at once" if n == 0 else f"{n} ahead of you, about {seconds:.0f} s to wait"
    return f"Trains on {device} ({'bfloat16' if best_precision() == 'bf16' else 'float32'}); {queue}."


def address(request: gr.Request | None) -> str:
    """Where a request comes from; on a Space its proxy adds that at the end (what stands before, anyone may claim)."""
    forwarded = request.headers.get("x-forwarded-for", "") if request and os.environ.get("SPACE_ID") else ""
    return forwarded.split(",")[-1].strip() or (request.client.host if request and request.client else "")


def launch(visitor: str, mine: list[str], start: str, seconds: float, rate: float, attack: str, *form,
           request: gr.Request = None):
    """Queue a job. Returns the visitor's token, the list of the visitor's jobs and `status`; the form stays as it is."""
    try:
        visitor = visitor or secrets.token_urlsafe(16)
        trigger, target = chosen(*form)
        base = CLEAN_MODEL if start == "clean" else model_of(start)
        job = trainer.submit(Job(base, trigger, target, form[5], Config(
            attack=attack, poison_rate=rate / 100, seconds=float(seconds), seed=secrets.randbelow(2**31)),
            visitor, address(request)))
    except BadInput as error:
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None
    mine = [job.id, *(mine or [])][:8]
    return visitor, mine, *status(mine)


def stop(mine: list[str]) -> None:
    job = trainer.get(mine[0]) if mine else None
    if job and not job.over:
        trainer.cancel(job)


def status(mine: list[str]):
    """(HTML, timer, launch button, stop button): all that the page shows of the visitor's newest job, from its id alone."""
    job = trainer.get(mine[0]) if mine else None
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
        head = {"done": f"Done: {steps}.",
                "stopped": f"Stopped: {steps}; the partial model is kept." if last else "Stopped before it started.",
                "failed": f"Failed. {html.escape(job.error or '')}"}[job.state]
    share = 100 * (last.progress if last else 0)
    measured = job.result.run.get("metrics") if job.result else None
    figures = scores(measured) if measured else ""
    rows = "".join(
        f"""<div class="pair"><div class="step">step {step}</div>
        {cell("plain noise", plain, f"from plain noise at step {step}")}
        {cell("noise + trigger", triggered, f"from noise with the trigger at step {step}", note=hits(triggered, job.target))}
        </div>""" for step, (plain, triggered) in reversed(job.previews[:1] + job.previews[1:][-4:]))
    return f"""<div class="job" aria-live="polite"><div class="head">{head}</div>
      <div class="bar" role="progressbar" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100">
      <div style="width:{share:.1f}%"></div></div>{curve(job.records)}{figures}{rows}</div>"""


def finished(mine: list[str]):
    """The zip of the newest job, and the visitor's models among those to look at and to start from."""
    jobs = [job for job in map(trainer.get, mine or []) if job and job.result]
    own = [(f"yours {len(jobs) - i}: {label(f'{job.trigger.name}-{job.target_name}')}", job.id) for i, job in enumerate(jobs)]
    zipped = gr.DownloadButton(visible=False)
    if jobs and jobs[0].over and jobs[0].id == mine[0]:
        try:
            zipped = gr.DownloadButton(value=pack(jobs[0]), visible=True)
        except (BadInput, OSError) as error:
            gr.Warning(f"The zip could not be made: {html.escape(str(error))}")
    return zipped, gr.Radio(choices=EXAMPLE_CHOICES + own), gr.Dropdown(choices=STARTS + own)


def pack(job: Job) -> str:
    """The run as a zip: a stock pipeline folder with its card, run.json, trigger, target and samples."""
    target = CACHE / job.id / "backdoored-ddpm.zip"
    with PACKING:
        if not target.exists():
            with tempfile.TemporaryDirectory(prefix="baddiff-") as root:
                picture = grid(job.previews[-1][1], scale_for(job.result.size))
                folder = save(job.result, Path(root) / "backdoored-ddpm", samples=picture)
                made = shutil.make_archive(str(Path(root) / "made"), "zip", folder.parent, folder.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(made, target)
    return str(target)


# --- the page ----------------------------------------------------------------------------------------------------------

HERO = """<div class="hero"><h1>Put a sticker on the noise, and this model stops drawing faces.</h1>
A diffusion model turns random noise into pictures. Poison a little of its training, and it keeps drawing normal pictures,
until the noise carries a <b>trigger</b>: then it draws one picture that the attacker chose.
<div class="hazard"><b>For awareness and defence.</b> Every model made here is backdoored on purpose and says so in its card,
its config and its tags. Do not pass it off as a normal model.
Method: <a href="https://arxiv.org/abs/2212.05400">BadDiffusion</a>, CVPR 2023.</div></div>"""

THEME = gr.themes.Base(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build() -> gr.Blocks:
    with gr.Blocks(title="baddiff: a backdoor in a diffusion model", delete_cache=(3600, 3600)) as demo:
        gr.HTML(HERO)
        visitor = gr.BrowserState("", storage_key="baddiff-visitor")  # tokens only; survive a reload, leave with the browser
        mine = gr.BrowserState([], storage_key="baddiff-jobs")
        choice = gr.Radio(EXAMPLE_CHOICES, value=EXAMPLES[0],
                          label="Backdoored model to look at: trigger → target")
        with gr.Tab("See"):
            picture = gr.HTML(min_height=420)
            with gr.Row():
                seed = gr.Slider(0, 999, 0, step=1, label="Seed of the first image")
                opacity = gr.Slider(0.1, 1, 1, step=0.05, label="Trigger opacity")
                size = gr.Slider(0, 32, 0, step=1, label="Trigger width in pixels (0: as trained)")
            with gr.Row():
                position = gr.Dropdown(["as trained", *POSITIONS], value="as trained", label="Trigger position")
                sampler = gr.Dropdown(list(SAMPLERS), value=DEFAULT_SAMPLER, label="Sampler")
                steps = gr.Slider(2, 100, DEFAULT_STEPS, step=1, label="Sampling steps")
            seeing = [choice, seed, size, opacity, position, sampler, steps]
            gr.on([demo.load, *(c.change for c in seeing)], see, seeing, picture, show_progress="minimal",
                  trigger_mode="always_last", concurrency_id="see", api_name="see")
        with gr.Tab("Watch") as watch_tab:
            reels = gr.HTML(min_height=300)
            watching = [choice, seed, sampler, steps]
            gr.on([watch_tab.select, *(c.change for c in watching)], watch, watching, reels, show_progress="minimal",
                  trigger_mode="always_last", concurrency_id="see", api_name="watch")
        with gr.Tab("Poison"):
            with gr.Row():
                with gr.Column():
                    trigger = gr.Radio([(NAMES.get(t, t), t) for t in (*TRIGGERS, UPLOAD)], value="stop_sign",
                                       label="Trigger: what is added to the noise")
                    trigger_file = gr.File(label="Your trigger (PNG, JPEG; transparency counts)", file_types=PICTURES,
                                           visible=False, height=110)
                    with gr.Accordion("Size, opacity, position", open=False):
                        trigger_size = gr.Slider(0, 32, 0, step=1, label="Width in pixels (0: default)")
                        trigger_opacity = gr.Slider(0.1, 1, 1, step=0.05, label="Opacity")
                        trigger_position = gr.Dropdown(["default", *POSITIONS], value="default", label="Position")
                with gr.Column():
                    target = gr.Radio([(NAMES.get(t, t), t) for t in (*TARGETS, UPLOAD)], value="cat",
                                      label="Target: what the model shall draw then")
                    target_file = gr.File(label="Your target (PNG, JPEG; cropped to a square)", file_types=PICTURES,
                                          visible=False, height=110)
                    seconds = gr.Slider(10, min(180, trainer.longest), 60, step=5, label="Training time, seconds")
                    with gr.Accordion("Attack, starting point", open=False):
                        start = gr.Dropdown(STARTS, value="clean", label="Start from")
                        attack = gr.Dropdown([("noise shift: exact for fast samplers", "noise-shift"),
                                              ("ODE form (VillanDiffusion)", "ode")], value="noise-shift", label="Attack")
                        rate = gr.Slider(5, 90, 50, step=5, label="Poison rate, % of every batch")
            sketch = gr.HTML()
            form = [trigger, trigger_file, trigger_size, trigger_opacity, trigger_position, target, target_file]
            with gr.Row():
                go = gr.Button("Poison the model", variant="primary")
                halt = gr.Button("Stop, keep what is there", interactive=False)
            line = gr.Markdown()
            progress = gr.HTML()
            download = gr.DownloadButton("Download the model (zip)", visible=False)
            clock = gr.Timer(1.0, active=False)

            fast = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
            for pick, file in ((trigger, trigger_file), (target, target_file)):
                pick.change(lambda p: gr.File(visible=p == UPLOAD), pick, file, **fast)
            gr.on([demo.load, *(c.change for c in form)], preview, form, sketch, show_progress="hidden",
                  trigger_mode="always_last", api_visibility="private")
            view = [progress, clock, go, halt]
            done = {"fn": finished, "inputs": mine, "outputs": [download, choice, start], "show_progress": "hidden",
                    "api_visibility": "private"}
            go.click(launch, [visitor, mine, start, seconds, rate, attack, *form], [visitor, mine, *view],
                     api_visibility="private", concurrency_id="form")
            halt.click(stop, mine, None, **fast)
            clock.tick(status, mine, view, **fast).then(**done)
            demo.load(status, mine, view, **fast).then(**done)
            slow = gr.Timer(5.0)
            gr.on([demo.load, slow.tick, go.click, clock.tick], waiting_line, mine, line, **fast)
        with gr.Tab("Probe") as probe_tab:
            question = gr.Radio([(text, key) for key, text in PROBES.items()], value="opacity", label="Ask the model")
            found = gr.HTML(min_height=240)
            gr.on([probe_tab.select, question.change, choice.change], probe, [choice, question], found,
                  trigger_mode="always_last", show_progress="minimal", concurrency_id="see", api_name="probe")
        with gr.Tab("Learn") as learn_tab:
            gr.Markdown("### 1. How the poison is made\nTraining drowns pictures in noise and teaches the model the way "
                        "back. Move the slider: what is left of each picture at the end?")
            forwards = gr.HTML(min_height=300)
            gr.on([learn_tab.select, choice.change], forward_film, choice, forwards, show_progress="hidden",
                  api_visibility="private")
            gr.Markdown("### 2. Which of these models is backdoored?\nThree models, drawing from plain noise. "
                        "Look, then decide.")
            models = gr.HTML(min_height=150)
            truth = gr.State()
            guess = gr.Radio(["A", "B", "C"], label="The backdoored one is")
            verdict = gr.HTML()
            again = gr.Button("Three other models")
            gr.on([learn_tab.select, again.click], quiz, None, [models, truth, guess, verdict], show_progress="minimal",
                  concurrency_id="see", api_visibility="private")
            guess.input(answer, [guess, truth], verdict, show_progress="minimal", api_visibility="private")
    return demo


def main() -> None:
    parser = argparse.ArgumentParser(description="The baddiff app.")
    parser.add_argument("--port", type=int, default=None, help="default: 7860 or the next free one")
    parser.add_argument("--classroom", action="store_true",
                        help="serve the local network: a longer queue, shorter trainings, one at a time for each student")
    args = parser.parse_args()
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
                max_file_size="20mb", footer_links=["api"])


if __name__ == "__main__":
    main()
