// The gallery: one card a job, kept in step with it.

import * as jobs from "./jobs.js";

const list = document.querySelector("#gallery");
const empty = document.querySelector("#empty");
const template = document.querySelector("#card");
const viewer = document.querySelector("#viewer");
const cards = new Map(); // job.key -> the card's elements

/** What the buttons of a card do, by name: each is called with the job. Set by the page. */
export const actions = {};

const element = (tag, properties) => Object.assign(document.createElement(tag), properties);

/** Makes or updates a job's card; new ones go first, unless `last`. */
export function render(job, { last = false } = {}) {
  const card = cards.get(job.key) ?? make(job, last);
  const { item, progress, state } = card;
  if (card.status !== job.status) {
    card.status = job.status;
    item.className = job.status;
    buttons(card, job);
    if (job.status === "completed") inView.observe(item);
  }
  const isActive = !jobs.isEnded(job);
  progress.hidden = !isActive;
  const done = job.steps ? job.step / job.steps : (job.progress ?? 0) / 100;
  if (done) progress.value = done;
  else progress.removeAttribute("value"); // says: at work, nobody knows how far
  state.textContent = inWords(job);
  job.results.forEach((result, index) => fill(card.figures[index], job, result, index));
}

export function discard(job) {
  const { item } = cards.get(job.key);
  const next = item.nextElementSibling ?? item.previousElementSibling;
  const hadFocus = item.contains(document.activeElement);
  item.remove();
  cards.delete(job.key);
  empty.hidden = list.children.length > 0;
  if (hadFocus) (next?.querySelector("article") ?? document.querySelector("#prompt")).focus();
}

function make(job, last) {
  const item = template.content.firstElementChild.cloneNode(true);
  const part = (name) => item.querySelector(name);
  const card = { job, item, progress: part("progress"), state: part(".state"), actions: part(".actions"), figures: [] };
  const { prompt = "", width = 1, height = 1, n = 1 } = job.settings;
  part("article").tabIndex = -1;
  part("article").setAttribute("aria-label", prompt);
  part(".prompt").textContent = prompt;
  part(".prompt").title = prompt;
  part(".settings").textContent = described(job);
  card.progress.setAttribute("aria-label", `Progress of ${prompt}`);
  part(".frame").classList.toggle("several", n > 1);
  for (let index = 0; index < n; index += 1) {
    const figure = element("figure");
    figure.style.setProperty("--ratio", `${width} / ${height}`);
    card.figures.push(figure);
  }
  part(".frame").append(...card.figures);
  cards.set(job.key, card);
  item.job = job;
  list[last ? "append" : "prepend"](item);
  if (!last) item.scrollIntoView({ block: "nearest" });
  empty.hidden = true;
  return card;
}

function inWords({ kind, status, stage, step, steps, error }) {
  if (status === "sending") return "Waiting to be sent";
  if (status === "queued") return kind === "video" ? "Waiting for its turn" : "Under way"; // a stream is silent at first
  if (status === "in_progress") return steps ? `Step ${step} of ${steps}` : sentence(stage ?? "under way");
  if (status === "failed") return `Failed: ${error ?? "the server does not say why."}`;
  if (status === "cancelled") return error ? `Cancelled. ${error}` : "Cancelled";
  return error ?? "";
}

const sentence = (words) => words[0].toUpperCase() + words.slice(1).replaceAll("_", " ");

function described({ settings: s, inputs }) {
  const without = s.negative_prompt ? ` · without “${s.negative_prompt}”` : "";
  const parts = [
    s.width && `${s.width} × ${s.height}`,
    s.num_frames && `${s.num_frames} frames`,
    s.fps && `${s.fps} fps`,
    s.num_inference_steps && `${s.num_inference_steps} steps`,
    s.guidance_scale != null && `guidance ${s.guidance_scale}`,
    s.guidance_scale_2 != null && `then ${s.guidance_scale_2}`,
    s.seed != null && `seed ${s.seed}`,
    inputs > 0 && `${inputs} input picture${inputs > 1 ? "s" : ""}`,
  ];
  return parts.filter(Boolean).map((part) => part.replaceAll(" ", "\u00a0")).join(" · ") + without;
}

/** Puts a preview or a result into its box. */
function fill(figure, job, { url, type, isFinal, elsewhere }, index) {
  if (figure.dataset.shown === url) return;
  figure.dataset.shown = url;
  const { prompt } = job.settings;
  if (elsewhere) {
    figure.replaceChildren(element("a", { href: elsewhere, textContent: "In cloud storage" }));
    return;
  }
  const isClip = type.startsWith("video/");
  const shown = isClip
    ? element("video", { src: url, controls: true, loop: true, muted: true, playsInline: true })
    : element("img", { src: url, alt: isFinal ? prompt : `Preview of ${prompt}`, className: isFinal ? "" : "preview" });
  shown.addEventListener("load", () => shown.classList.toggle("coarse", shown.naturalWidth <= 128));
  figure.replaceChildren(shown);
  if (!isFinal) return;
  if (!isClip) {
    const button = element("button", { type: "button", ariaLabel: `Enlarge picture ${index + 1}: ${prompt}` });
    button.addEventListener("click", () => enlarge(shown));
    shown.replaceWith(button);
    button.append(shown);
  }
  const name = `${job.id}${index ? `-${index}` : ""}.${type.split("/")[1]}`;
  figure.append(element("a", { className: "download", textContent: "Download", href: url, download: name }));
}

function enlarge(shown) {
  Object.assign(viewer.querySelector("img"), { src: shown.src, alt: shown.alt, className: shown.className });
  viewer.showModal();
}
viewer.addEventListener("click", (event) => {
  if (event.target === viewer) viewer.close(); // the backdrop
});

function buttons({ item, actions: row }, job) {
  const hadFocus = row.contains(document.activeElement);
  const names = jobs.isEnded(job) ? ["Use settings", "New seed", job.kind === "video" ? "Delete" : "Remove"] : ["Cancel"];
  row.replaceChildren(...names.map((name) => {
    const button = element("button", { type: "button", textContent: name });
    button.addEventListener("click", () => actions[name](job));
    return button;
  }));
  if (hadFocus) item.querySelector("article").focus();
}

/** Files of earlier jobs are fetched when their card is about to be seen. */
const inView = new IntersectionObserver(async (entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    inView.unobserve(target);
    await actions.load(target.job);
  }
}, { rootMargin: "200px" });
