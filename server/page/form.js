// The form. What the model can do decides which controls there are; its defaults are what they hold at first.

const form = document.querySelector("#draw");
const error = document.querySelector("#error");
const drop = document.querySelector("#drop");
const settings = document.querySelector("#settings");
const chooser = document.querySelector("#image_path");

/** Names of fields in the API whose control here has another one. */
const CONTROLS = { size: "width", image: "image_path", input_reference: "image_path", num_outputs_per_prompt: "n", seconds: "num_frames" };

let defaults = {};
let pictures = []; // File objects, in their order

/** Shows the controls of this model, with its defaults and limits. */
export function fit(card) {
  const { draws_video: video, size_step, frame_step, takes_pictures: counts = [0, 1] } = card;
  const known = card.defaults; // those of a diffusers pipeline are not
  const most = Math.max(...counts);
  const abilities = {
    video,
    picture: !video,
    inputs: most > 0,
    guidance: !known || known.guidance_scale != null,
    "second-guidance": known?.guidance_scale_2 != null,
    negative: !known || card.negative_prompt_by_default,
  };
  for (const field of form.querySelectorAll("[data-needs]")) {
    field.hidden = !abilities[field.dataset.needs];
    for (const control of field.querySelectorAll("input, textarea")) control.disabled = field.hidden;
  }
  for (const [names, step, least] of [[["width", "height"], size_step, size_step], [["num_frames"], frame_step, 1]]) {
    for (const name of names) Object.assign(form.elements[name], { step: step ?? 1, min: least ?? 1 });
  }
  const rules = [size_step && `Width and height: multiples of ${size_step}.`, frame_step && `Frames: ${frame_step} k + 1.`];
  document.querySelector("#rules").textContent = rules.filter(Boolean).join(" ");
  document.querySelector("#how-many").textContent = inWords(counts);
  defaults = { ...known, n: 1 };
  form.hidden = false;
  write({});
}

/** How many pictures there may be, of the counts that a model takes. */
function inWords(counts) {
  const [least, most] = [Math.min(...counts), Math.max(...counts)];
  const number = least === most || most === 1 ? `${most}` : `${least || 1} to ${most}`;
  return `${number} picture${most > 1 ? "s" : ""}${least ? "" : ", or none"}.`;
}

/** What the controls hold, by the names of the API. Those left empty are missing. */
export function read() {
  const said = {};
  for (const { name, type, value, disabled } of form.elements) {
    if (!name || disabled || type === "file" || value.trim() === "") continue;
    said[name] = type === "number" ? Number(value) : value.trim();
  }
  return { settings: said, pictures: [...pictures] };
}

/** Puts settings into the controls: those of a job, or none for the model's defaults. */
export function write(said, files = []) {
  for (const control of form.elements) {
    if (!control.name || control.type === "file") continue;
    const kept = control.name === "prompt" ? control.value : "";
    control.value = said[control.name] ?? defaults[control.name] ?? kept;
  }
  choose(files);
  clear();
}

export function focus() {
  form.elements.prompt.focus();
  form.scrollIntoView({ block: "nearest" });
}

/** Shows the server's message, at the control that it is about where there is one. */
export function complain({ message, param }) {
  clear();
  error.textContent = message;
  const control = form.elements[CONTROLS[param] ?? param];
  if (!control?.name || control.disabled) return;
  settings.open ||= settings.contains(control);
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", error.id);
  control.focus();
}

export function clear() {
  error.textContent = "";
  for (const control of form.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-describedby");
  }
}

function choose(files) {
  pictures = [...files];
  const list = document.querySelector("#inputs");
  for (const img of list.querySelectorAll("img")) URL.revokeObjectURL(img.src);
  list.replaceChildren(...pictures.map((file) => {
    const item = document.createElement("li");
    const img = document.createElement("img");
    img.src = URL.createObjectURL(file);
    img.alt = file.name;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.addEventListener("click", () => {
      choose(pictures.filter((other) => other !== file));
      chooser.focus();
    });
    item.append(img, remove);
    return item;
  }));
}

/** Takes what was chosen, dropped or pasted; says whether there was a picture among it. */
function add(files) {
  const found = [...files].filter((file) => file.type.startsWith("image/"));
  if (found.length && !chooser.disabled) choose([...pictures, ...found]);
  return found.length > 0 && !chooser.disabled;
}

chooser.addEventListener("change", () => {
  add(chooser.files);
  chooser.value = ""; // the same file may be chosen again
});
drop.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  add(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (add(event.clipboardData.files)) event.preventDefault();
});

settings.open = matchMedia("(min-width: 56.01rem)").matches; // beside the gallery, or before it
document.querySelector("#swap").addEventListener("click", () => {
  const { width, height } = form.elements;
  [width.value, height.value] = [height.value, width.value];
});
document.querySelector("#defaults").addEventListener("click", () => write({}));
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  }
});
