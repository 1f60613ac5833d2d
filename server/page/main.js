// The page: finds out what the server has, and connects the form with the gallery.

import { Refused, ask, key } from "./api.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as jobs from "./jobs.js";

const server = document.querySelector("#server");
const queue = document.querySelector("#queue");
const login = document.querySelector("#login");

let card = null; // of the model, once the server has told

// -- the server --------------------------------------------------------------

/** Keeps an eye on the server for as long as the page is open, and is seen. */
async function watch() {
  for (;;) {
    let seconds = 5;
    try {
      await look();
    } catch (error) {
      seconds = error.status === 401 ? 0 : 2;
      if (error.status === 401) await askForKey();
      else tell("away", error.message);
    }
    await new Promise((go) => setTimeout(go, 1000 * seconds));
    if (document.hidden) await new Promise((go) => document.addEventListener("visibilitychange", go, { once: true }));
  }
}

async function look() {
  const info = await (await ask("server_info")).json();
  const { state, error } = info.engine;
  const words = { starting: "Loading the model", ready: "Ready", restarting: "Restarting the engine", failed: "Failed" };
  tell(state, (words[state] ?? state) + (error ? `: ${error}` : ""));
  queue.textContent = info.jobs.queued ? ` · ${info.jobs.queued} waiting` : "";
  if (card && card.id !== info.model) location.reload(); // another server has taken its place
  if (state === "ready" && !card) await begin();
}

function tell(state, text) {
  server.dataset.state = state;
  if (server.textContent !== text) server.textContent = text; // a screen reader speaks at each change
}

/** The model is there: its form, and the jobs of earlier visits. */
async function begin() {
  const found = await (await ask("model_info")).json();
  const earlier = await jobs.earlier(found.draws_video);
  card = found;
  document.querySelector("#model").textContent = card.id;
  document.title = `${card.id} · sglang`;
  form.fit(card);
  if (document.activeElement === document.body || login.contains(document.activeElement)) form.focus();
  for (const job of earlier) {
    gallery.render(job, { last: true });
    if (!jobs.isEnded(job)) jobs.follow(job, gallery.render);
  }
}

async function askForKey() {
  tell("locked", "Locked");
  document.querySelector("#login-error").textContent = key.get() ? "The server does not know this key." : "";
  login.hidden = false;
  document.querySelector("#draw").hidden = true;
  login.elements.key.focus();
  await new Promise((go) => login.addEventListener("submit", (event) => go(event.preventDefault()), { once: true }));
  key.set(login.elements.key.value);
  login.hidden = true;
  document.querySelector("#draw").hidden = !card;
}

// -- drawing -----------------------------------------------------------------

async function draw(settings, pictures) {
  const seed = settings.seed ?? Math.floor(Math.random() * 2 ** 32);
  const job = jobs.newJob(card.draws_video ? "video" : "image", { ...settings, seed }, pictures);
  gallery.render(job);
  say("Drawing has begun.");
  try {
    await jobs.draw(job, gallery.render);
    say({ completed: "Finished.", cancelled: "Cancelled.", failed: `Failed: ${job.error}` }[job.status]);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    gallery.discard(job);
    form.complain(error);
  }
}

/** Tells those who listen. */
function say(text) {
  document.querySelector("#said").textContent = text;
}

document.querySelector("#draw").addEventListener("submit", (event) => {
  event.preventDefault();
  form.clear();
  const { settings, pictures } = form.read();
  if (settings.prompt) draw(settings, pictures);
  else form.complain({ message: "Say what to draw.", param: "prompt" });
});

/** A job's settings in the form. False if they are not all there: a browser forgets files when it leaves a page. */
function reuse(job, changes = {}) {
  form.write({ ...job.settings, ...changes }, job.pictures);
  if (job.pictures.length === job.inputs) return true;
  form.complain({ message: "Choose the input pictures again: they were not kept.", param: "image" });
  return false;
}

async function remove(job) {
  await jobs.remove(job);
  gallery.discard(job);
}

/** For what may go wrong between a button and the server. */
const shown = (action) => (job) => action(job).catch((error) => form.complain(error));

Object.assign(gallery.actions, {
  async "Use settings"(job) {
    if (reuse(job)) form.focus();
  },
  "New seed": shown(async (job) => {
    const { seed, ...settings } = job.settings;
    if (job.pictures.length === job.inputs) await draw(settings, job.pictures);
    else reuse(job, { seed: "" });
  }),
  Cancel: shown(async (job) => {
    await jobs.cancel(job);
    gallery.render(job);
  }),
  Remove: shown(remove),
  Delete: shown(remove),
  async load(job) {
    try {
      await jobs.fetchResults(job);
    } catch (error) {
      if (error.status === 404 && job.kind === "image") {
        jobs.forget(job); // the server has not kept it
        return gallery.discard(job);
      }
      job.error = error.message;
    }
    gallery.render(job);
  },
});

watch();
