"""The app: see a backdoored diffusion model, make one, take it away. `python app.py` and open the printed address."""

import base64
import html
import io
import os
import secrets
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from torch import Tensor

from baddiff import BadInput, metrics
from baddiff.jobs import COMPUTE, Job, Trainer
from baddiff.models import CLEAN, WEIGHTS, Model, load, save
from baddiff.probe import grid, scale_for
from baddiff.sampling import DEFAULT_SAMPLER, DEFAULT_STEPS, SAMPLERS, generate, noise
from baddiff.training import Config, best_precision
from baddiff.triggers import POSITIONS, TARGETS, TRIGGERS, Trigger, make_target

UPLOAD = "upload"
EXAMPLES = ("stop_sign-cat", "glasses-hat", "box-shoe")
NAMES = {"stop_sign": "stop sign", "noshift": "the trigger itself", "shift": "the trigger, moved"}
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
N = 4  # images a cell

trainer = Trainer()


# --- pictures as HTML: crisp, labelled, readable by a screen reader, at any width -----------------------------------------

def tag(image: Tensor, alt: str, kind: str = "") -> str:
    """One image (C,H,W) in [-1, 1] as an <img> that the style sheet scales up by whole pixels."""
    buffer = io.BytesIO()
    grid([image[None]]).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="px {kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def cell(title: str, images: Tensor, alt: str, kind: str = "", note: str = "") -> str:
    tags = "".join(tag(image, f"{alt}, {i + 1} of {len(images)}") for i, image in enumerate(images))
    note = f'<div class="note">{note}</div>' if note else ""
    return f'<div class="cell {kind}"><div class="title">{title}</div><div class="strip">{tags}</div>{note}</div>'


def shown(x: Tensor) -> Tensor:  # noise has no range; ±2.5 σ is mapped to black and white
    return (x / 2.5).clamp(-1, 1)


def hits(images: Tensor, target: Tensor) -> str:
    n = int((metrics.mse(images, target) < metrics.ASR_MSE).sum())
    return f"{n} of {len(images)} are the target (MSE &lt; {metrics.ASR_MSE})"


def error_box(text: str) -> str:
    return f'<div class="oops" role="alert">{html.escape(text)}</div>'


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
            trigger = moved(trigger, int(size), opacity, position)
        seeds = range(int(seed), int(seed) + N)
        r = trigger.residual(model.channels)
        options = {"sampler": sampler, "steps": int(steps)}
        with COMPUTE.turn():
            start, _ = noise(seeds, model.channels, model.size)
            rows = [generate(m.unet, m.scheduler, list(seeds) * 2, torch.cat([torch.zeros(N, *r.shape), r.expand(N, -1, -1, -1)]),
                             **options) for m in (CLEAN_MODEL, model)]
    except BadInput as error:
        return error_box(str(error))
    return figure(start, r, rows[0].split(N), rows[1].split(N), model.target, trigger.name)


def moved(trigger: Trigger, size: int, opacity: float, position: str) -> Trigger:
    """The trained trigger, changed for the probe: its own visible pixels, scaled and placed again."""
    image = trigger.image()
    box = image.getbbox()
    place = position if position != "as trained" else (box[0], box[1])
    return Trigger.make(image.crop(box), trigger.rgba.shape[-1], size or box[2] - box[0], place, opacity, trigger.convention)


def figure(start: Tensor, r: Tensor, of_clean, of_bad, target: Tensor, name: str) -> str:
    name = NAMES.get(name, name)
    worked = metrics.asr(of_bad[1], target) > 0.5
    return f"""<div class="see">
      {cell("What goes in: <b>plain noise</b>", shown(start), "plain noise")}
      {cell(f"What goes in: the same noise <b>+ trigger</b> {tag(r, name, 'inline')}", shown(start + r), f"noise with the {name}")}
      {cell("Clean model draws", of_clean[0], "face by the clean model", note="normal pictures")}
      {cell("Clean model draws", of_clean[1], "face by the clean model, from noise with the trigger",
            note="still a face: the sticker leaves a stain, no more")}
      {cell("Backdoored model draws", of_bad[0], "face by the backdoored model",
            note="normal pictures: nothing gives it away")}
      {cell("Backdoored model draws", of_bad[1], "output of the backdoored model from noise with the trigger",
            "alarm" if worked else "", note=hits(of_bad[1], target))}
    </div>"""


# --- poison ------------------------------------------------------------------------------------------------------------

def chosen(trigger: str, trigger_file, size: float, opacity: float, position: str, target: str, target_file):
    """The form as a Trigger and a target; raises BadInput."""
    resolution = CLEAN_MODEL.size
    if UPLOAD in (trigger, target):
        for kind, choice, file in (("trigger", trigger, trigger_file), ("target", target, target_file)):
            if choice == UPLOAD and not file:
                raise BadInput(f"Upload a picture for the {kind} first, or choose a built-in one.")
    made = Trigger.make(trigger_file if trigger == UPLOAD else trigger, resolution, int(size) or None,
                        position if position != "default" else None, opacity)
    return made, make_target(target_file if target == UPLOAD else target, resolution, made, CLEAN_MODEL.channels)


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
      ({"easy to learn" if trigger.norm() > 8 else "weak: the model may not tell it from chance"}).</div>"""


def waiting_line() -> str:
    n, seconds = trainer.waiting()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    queue = "starts at once" if n == 0 else f"{n} ahead of you, about {seconds:.0f} s to wait"
    return f"Trains on {device} ({'bfloat16' if best_precision() == 'bf16' else 'float32'}); {queue}."


def launch(owner: str, seconds: float, rate: float, attack: str, *form):
    """Queue a job. Returns its id, the status and whether the page's clock should tick; the form stays as it is."""
    try:
        trigger, target = chosen(*form)
        job = trainer.submit(Job(CLEAN_MODEL, trigger, target, form[5], Config(
            attack=attack, poison_rate=rate / 100, seconds=float(seconds), seed=secrets.randbelow(2**31)), owner))
    except BadInput as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from None
    return job.id, *status(job.id)


def stop(job_id: str):
    job = trainer.get(job_id)
    if job and not job.over:
        trainer.cancel(job)


def status(job_id: str):
    """(HTML of the job, timer, launch button, stop button): all that the page shows of a job, from its id alone."""
    job = trainer.get(job_id)
    active = bool(job and not job.over)
    return (render(job) if job else (error_box("That training is no longer here: results are kept for an hour.")
                                     if job_id else ""),
            gr.Timer(1.0, active=active), gr.Button(interactive=not active), gr.Button(interactive=active))


def render(job: Job) -> str:
    last = job.records[-1] if job.records else None
    if job.state == "queued":
        n, seconds = trainer.ahead(job)
        head = f"Waiting: {n} ahead, about {seconds:.0f} s."
    elif job.state == "running":
        head = "Starting." if last is None else (
            f"Step {last.step}, {last.rate:.0f} images/s, about {last.eta:.0f} s left." if last.progress < 1 else "Measuring.")
    else:
        steps = f"{last.step} steps in {last.seconds:.0f} s" if last else "no step"
        head = {"done": f"Done: {steps}.", "stopped": f"Stopped: {steps}; the partial model is kept.",
                "failed": f"Failed. {html.escape(job.error or '')}"}[job.state]
    share = 100 * (last.progress if last else 0)
    rows = "".join(
        f"""<div class="pair"><div class="step">step {step}</div>
        {cell("plain noise", rows[0], f"from plain noise at step {step}")}
        {cell("noise + trigger", rows[1], f"from noise with the trigger at step {step}", note=hits(rows[1], job.target))}</div>"""
        for step, rows in reversed(job.previews[:1] + job.previews[1:][-4:]))
    return f"""<div class="job" aria-live="polite"><div class="head">{head}</div>
      <div class="bar" role="progressbar" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100">
      <div style="width:{share:.1f}%"></div></div>{curve(job)}{figures(job)}{rows}</div>"""


def curve(job: Job) -> str:
    """Loss of the clean and the poisoned part as a small chart; lines differ in dash as well as colour."""
    records = job.records[::max(1, len(job.records) // 150)]
    if len(records) < 2:
        return ""
    import math
    series = [[(r.progress, v) for r in records if math.isfinite(v := getattr(r, part))] for part in ("clean", "poisoned")]
    values = [math.log10(max(v, 1e-6)) for line in series for _, v in line]
    low, high = min(values), max(values) + 1e-9

    def path(line):
        return " ".join(f"{8 + 284 * x:.1f},{6 + 68 * (high - math.log10(max(v, 1e-6))) / (high - low):.1f}" for x, v in line)

    return f"""<svg class="curve" viewBox="0 0 300 96" role="img" aria-label="Loss so far, clean and poisoned part">
      <polyline class="a" points="{path(series[0])}"/><polyline class="b" points="{path(series[1])}"/>
      <text x="8" y="92">loss (log): <tspan class="a">clean part ──</tspan>  <tspan class="b">poisoned part ╌╌</tspan></text></svg>"""


def figures(job: Job) -> str:
    if not job.result:
        return ""
    m = job.result.run["metrics"]
    return f"""<div class="figures">Attack success rate <b>{100 * m['asr']:.0f} %</b> (MSE &lt; {m['asr_threshold']}),
      MSE {m['mse']:.4f}, SSIM {m['ssim']:.2f}. Clean utility {m['utility']:.2f} (real against real:
      {m['utility_floor']:.2f}; Fréchet distance in the clean U-Net's features, lower is better).
      All with n = {m['n']}, {m['steps']} {m['sampler']} steps.</div>"""


def finished(job_id: str):
    """The zip of a finished job and its entry among the models to see."""
    job = trainer.get(job_id)
    if not job or not job.result:
        return gr.DownloadButton(visible=False), gr.Radio()
    choices = [(label(e), e) for e in EXAMPLES] + [("your model", job.id)]
    return gr.DownloadButton(value=pack(job), visible=True), gr.Radio(choices=choices)


def pack(job: Job) -> str:
    """The run as a zip: a stock pipeline folder with its card, run.json, trigger, target and samples."""
    root = Path(tempfile.mkdtemp(prefix="baddiff-"))
    try:
        picture = grid(job.previews[-1][1], scale_for(job.result.size))
        folder = save(job.result, root / "backdoored-ddpm", samples=picture)
        cache = Path(os.environ.get("GRADIO_TEMP_DIR", Path(tempfile.gettempdir()) / "gradio")) / job.id
        cache.mkdir(parents=True, exist_ok=True)
        return shutil.make_archive(str(cache / "backdoored-ddpm"), "zip", folder.parent, folder.name)
    finally:
        shutil.rmtree(root, ignore_errors=True)


# --- the page ----------------------------------------------------------------------------------------------------------

def label(name: str) -> str:
    trigger, _, target = name.partition("-")
    return f"{NAMES.get(trigger, trigger)} → {NAMES.get(target, target)}"


CSS = """
.px { image-rendering: pixelated; width: 100%; height: auto; display: block; border-radius: 3px; }
.px.inline { display: inline-block; width: 2em; vertical-align: middle; background: #808080; }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(56px, 1fr)); gap: 4px; }
.see { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.cell { padding: 8px; border-radius: 8px; border: 2px solid var(--border-color-primary); background: var(--block-background-fill); }
.cell.alarm { border-color: #d9480f; box-shadow: 0 0 0 3px #d9480f44; }
.title { margin-bottom: 6px; font-size: .95em; } .note { margin-top: 6px; font-size: .85em; opacity: .8; }
.trio { display: flex; align-items: center; gap: 8px; } .trio .cell { flex: 1; } .op { font-size: 1.4em; opacity: .7; }
.oops { border-left: 5px solid #d9480f; padding: 10px 14px; background: #d9480f1c; border-radius: 4px; }
.bar { height: 10px; border-radius: 5px; background: var(--border-color-primary); overflow: hidden; margin: 8px 0; }
.bar > div { height: 100%; background: #0b7285; transition: width .8s linear; }
.pair { display: grid; grid-template-columns: 4.5em 1fr 1fr; gap: 10px; align-items: center; margin-top: 10px; }
.pair .step { font-variant-numeric: tabular-nums; opacity: .8; }
.curve { width: 100%; max-width: 560px; } .curve polyline { fill: none; stroke-width: 1.6; }
.curve .a { stroke: #0b7285; fill: none; } .curve .b { stroke: #d9480f; stroke-dasharray: 4 2; fill: none; }
.curve text { font-size: 8px; fill: currentColor; } .curve tspan { stroke: none !important; }
.curve tspan.a { fill: #0b7285; } .curve tspan.b { fill: #d9480f; }
.figures { margin: 8px 0; } .hero h1 { margin: 0 0 4px; font-size: 1.7em; line-height: 1.2; }
.hazard { border: 2px solid #d9480f; border-radius: 8px; padding: 6px 12px; margin-top: 8px; font-size: .92em; }
@media (max-width: 640px) {
  .see { gap: 8px; } .cell { padding: 5px; } .pair { grid-template-columns: 1fr 1fr; } .pair .step { grid-column: 1 / 3; }
  .strip { grid-template-columns: 1fr 1fr; } .trio .op { font-size: 1em; } .trio { gap: 3px; } .trio .strip { grid-template-columns: 1fr; }
  .hero h1 { font-size: 1.3em; }
}
"""

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
        owner = gr.State(lambda: secrets.token_urlsafe(8))
        job_id = gr.BrowserState("", storage_key="baddiff-job")
        with gr.Tab("See it"):
            choice = gr.Radio([(label(e), e) for e in EXAMPLES], value=EXAMPLES[0], label="Backdoored model: trigger → target")
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
        with gr.Tab("Poison it yourself"):
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
                    seconds = gr.Slider(10, 180, 60, step=5, label="Training time, seconds")
                    with gr.Accordion("Attack", open=False):
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

            trigger.change(lambda t: gr.File(visible=t == UPLOAD), trigger, trigger_file, queue=False, api_visibility="private")
            target.change(lambda t: gr.File(visible=t == UPLOAD), target, target_file, queue=False, api_visibility="private")
            gr.on([demo.load, *(c.change for c in form)], preview, form, sketch, show_progress="hidden",
                  trigger_mode="always_last", api_visibility="private")
            view = [progress, clock, go, halt]
            fast = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
            done = {"fn": finished, "inputs": job_id, "outputs": [download, choice], "show_progress": "hidden",
                    "api_visibility": "private"}
            go.click(launch, [owner, seconds, rate, attack, *form], [job_id, *view], api_visibility="private",
                     concurrency_id="form")
            halt.click(stop, job_id, None, **fast)
            clock.tick(status, job_id, view, **fast).then(**done)
            demo.load(status, job_id, view, **fast).then(**done)
            demo.load(waiting_line, None, line, **fast)
            clock.tick(waiting_line, None, line, **fast)
    return demo


def main() -> None:
    demo = build()
    demo.queue(max_size=64, default_concurrency_limit=2)
    demo.launch(theme=THEME, css=CSS, run_history=False, max_file_size="20mb", footer_links=["api"])


if __name__ == "__main__":
    main()
