// Jobs: asking for them, following them, cancelling, and remembering them over a reload.
//
// A job is a plain object: {key, id, kind, status, settings, pictures, inputs, step, steps, results, error}. `key` is the
// page's own, for the time before the server has given an id. `pictures` are input files, `inputs` their number, which
// is known longer. `results` are by index what there is to see, be it a preview.

import { Refused, ask, events } from "./api.js";

const STORE = "sglang-jobs";
const KEPT = 300; // jobs whose settings are remembered

const aborts = new Map(); // job.key -> AbortController of its stream

export const isEnded = (job) => ["completed", "failed", "cancelled"].includes(job.status);

// -- memory ------------------------------------------------------------------

const remembered = () => JSON.parse(localStorage.getItem(STORE) ?? "[]");
const store = (list) => localStorage.setItem(STORE, JSON.stringify(list.slice(0, KEPT)));

function remember(job) {
  const { key, id, kind, status, settings, inputs, error } = job;
  store([{ key, id, kind, status, settings, inputs, error }, ...others(job)]);
}

const others = (job) => remembered().filter(({ key, id }) => key !== job.key && !(id && id === job.id));
export const forget = (job) => store(others(job));

/** The jobs of earlier visits, newest first: clips as the server lists them, pictures as this browser remembers. */
export async function earlier(drawsVideo) {
  const mine = remembered().map((job) => ({ ...job, pictures: [], results: [] }));
  if (drawsVideo) {
    const videos = await listed();
    return videos.map((video) => ({ ...(mine.find((job) => job.id === video.id) ?? unknown(video)), ...stateOf(video) }));
  }
  const pictures = mine.filter((job) => job.kind === "image");
  for (const job of pictures.filter((job) => !isEnded(job))) {
    job.status = "cancelled"; // by the server, when the connection was closed
    job.error = "The page was left before it was finished.";
    remember(job);
  }
  return pictures;
}

async function listed() {
  const videos = [];
  for (let page = { has_more: true }; page.has_more; videos.push(...page.data)) {
    page = await (await ask(`v1/videos?limit=100${page.last_id ? `&after=${page.last_id}` : ""}`)).json();
  }
  return videos;
}

/** A clip that another client asked for, or this one long ago. */
function unknown({ id, prompt, size }) {
  const [width, height] = size.split("x").map(Number);
  return { key: id, kind: "video", settings: { prompt, width, height }, inputs: 0, pictures: [], results: [] };
}

const stateOf = ({ id, status, progress, error }) => ({ id, status, progress, error: error?.message });

// -- work --------------------------------------------------------------------

export function newJob(kind, settings, pictures) {
  const key = `${Date.now()}-${Math.random()}`;
  return { key, kind, status: "sending", settings, pictures, inputs: pictures.length, results: [] };
}

/** Has a job drawn; `changed(job)` is called at each news of it. Throws Refused if the server does not take it. */
export async function draw(job, changed) {
  const abort = new AbortController();
  aborts.set(job.key, abort);
  remember(job);
  try {
    await (job.kind === "video" ? drawVideo : drawPictures)(job, abort.signal, changed);
  } catch (error) {
    if (job.status === "sending" && error instanceof Refused) {
      forget(job);
      throw error;
    }
    const wasCancelled = abort.signal.aborted || error.code === "job_cancelled"; // here, or by another
    if (!isEnded(job)) Object.assign(job, wasCancelled ? { status: "cancelled" } : { status: "failed", error: error.message });
  } finally {
    aborts.delete(job.key);
  }
  remember(job);
  changed(job);
}

/** A browser keeps at most six connections to a host: streams leave two for all else. */
const turns = { free: 4, waiting: [] };

async function inTurn(run) {
  if (turns.free === 0) await new Promise((go) => turns.waiting.push(go));
  else turns.free -= 1;
  try {
    return await run();
  } finally {
    if (turns.waiting.length) turns.waiting.shift()();
    else turns.free += 1;
  }
}

async function drawPictures(job, signal, changed) {
  const fields = { ...job.settings, response_format: "b64_json", stream: true, partial_images: 2 };
  await inTurn(async () => {
    signal.throwIfAborted();
    const path = job.pictures.length ? "v1/images/edits" : "v1/images/generations";
    const answer = await ask(path, { ...request(fields, "image[]", job.pictures), signal });
    Object.assign(job, { id: answer.headers.get("x-job-id"), status: "queued" });
    remember(job);
    changed(job);
    for await (const event of events(answer)) {
      if (event.error) throw new Refused(0, event.error);
      take(job, event);
      changed(job);
    }
  });
  if (!isEnded(job)) throw new Error("The server ended its answer before the picture was finished.");
}

/** A clip is drawn without anyone watching; it is given over, then followed. */
async function drawVideo(job, signal, changed) {
  const fields = { ...job.settings, partial_images: 2 };
  const video = await (await ask("v1/videos", request(fields, "input_reference", job.pictures))).json();
  Object.assign(job, stateOf(video));
  remember(job);
  changed(job);
  if (signal.aborted) await cancel(job); // it was, before it had an id
  await follow(job, changed);
}

/** Tells of a clip until it has ended, over lost connections. */
export async function follow(job, changed) {
  while (!isEnded(job)) {
    try {
      await inTurn(async () => {
        for await (const event of events(await ask(`v1/videos/${job.id}/events`))) {
          take(job, event);
          changed(job);
        }
      });
      if (!isEnded(job)) Object.assign(job, stateOf(await (await ask(`v1/videos/${job.id}`)).json()));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (error.status === 404) job.status = "cancelled"; // and deleted, by another
    }
    if (!isEnded(job)) await new Promise((go) => setTimeout(go, 2000));
  }
  changed(job);
}

/** A request's body: a form where there are pictures. */
function request(fields, name, pictures) {
  if (!pictures.length) return { method: "POST", json: fields };
  const body = new FormData();
  for (const [field, value] of Object.entries(fields)) body.append(field, String(value));
  for (const picture of pictures) body.append(name, picture);
  return { method: "POST", body };
}

/** One event of a stream: a stage, a step, something to see, or the end. */
function take(job, event) {
  const { type, stage, step, index = 0 } = event;
  if (job.status === "queued") job.status = "in_progress";
  if (step != null) Object.assign(job, { stage, step, steps: event.steps ?? job.settings.num_inference_steps });
  if (event.b64_json) show(job, index, blob(event.b64_json, `image/${event.output_format}`), type.endsWith(".completed"));
  if (event.status) Object.assign(job, stateOf(event));
  const finished = job.results.filter((result) => result?.isFinal).length;
  if (job.kind === "image" && finished === (job.settings.n ?? 1)) job.status = "completed";
}

function show(job, index, data, isFinal) {
  if (job.results[index]) URL.revokeObjectURL(job.results[index].url);
  job.results[index] = { url: URL.createObjectURL(data), type: data.type, isFinal };
}

function blob(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type });
}

/** Fetches a completed job's files. Throws Refused with status 404 if the server has them no more. */
export async function fetchResults(job) {
  const count = job.kind === "video" ? 1 : job.settings.n ?? 1;
  for (let index = 0; index < count; index += 1) {
    if (job.results[index]?.isFinal) continue;
    const answer = await ask(contentPath(job, index));
    if (answer.type === "opaqueredirect") job.results[index] = { elsewhere: contentPath(job, index), isFinal: true };
    else show(job, index, await answer.blob(), true);
  }
}

const contentPath = (job, index) =>
  job.kind === "video" ? `v1/videos/${job.id}/content` : `v1/images/${job.id}/content?index=${index}`;

export async function cancel(job) {
  aborts.get(job.key)?.abort();
  if (!job.id) job.status = "cancelled";
  else await ask(`v1/cancel/${job.id}`, { method: "POST" });
}

/** Takes a job off the list: a clip from the server too; a picture, which it lists nowhere, from this browser's memory. */
export async function remove(job) {
  try {
    if (job.kind === "video") await ask(`v1/videos/${job.id}`, { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404) throw error;
  }
  for (const result of job.results) if (result?.url) URL.revokeObjectURL(result.url);
  forget(job);
}
