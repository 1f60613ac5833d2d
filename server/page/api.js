// Talking to the server: the key, errors as sentences, server-sent events.

/** An answer that is not the one hoped for: the server's message, its code, and the field it is about. */
export class Refused extends Error {
  constructor(status, { message, code = null, param = null }) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

export const key = {
  get: () => sessionStorage.getItem("api-key"),
  set: (value) => sessionStorage.setItem("api-key", value),
};

/** Paths are relative, so that the page also works behind a proxy that serves it under a prefix. */
export async function ask(path, { method = "GET", json, body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (json) headers["Content-Type"] = "application/json";
  let answer;
  try {
    // a redirect leads to cloud storage: another host, which this page never asks
    answer = await fetch(path, { method, headers, body: json ? JSON.stringify(json) : body, signal, redirect: "manual" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, { message: "The server cannot be reached." });
  }
  if (!answer.ok && answer.type !== "opaqueredirect") {
    const told = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, told.error ?? { message: `The server answered with status ${answer.status}.` });
  }
  return answer;
}

/** The JSON data of each server-sent event of an answer, and of comments that hold some: progress. Ends with it. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Refused(0, { message: "The connection to the server was lost." });
      });
      if (done) return;
      const blocks = (text + value).replaceAll("\r\n", "\n").split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n");
        const data = lines.filter((line) => /^(data:|: \{)/.test(line)).map((line) => line.replace(/^(data)?:/, ""));
        if (data.length) yield JSON.parse(data.join("\n"));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
