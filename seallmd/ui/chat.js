// A small chat, over OpenAI's API. Answers are shown as text, whatever is in them.

import { $, el, say } from "./dom.js";
import { seconds, serviceVariable } from "./looks.js";
import { ask, complaint, documents } from "./stream.js";

const messages = [];
const plainModels = new Set(); // without a chat template: they continue a text
let abort = null;

export function startChat() {
  const [form, text] = [$("chat-form"), $("chat-text")];
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (abort) abort.abort();
    else if (text.value.trim()) send(text);
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!abort) form.requestSubmit();
    }
  });
  $("chat-clear").addEventListener("click", () => {
    abort?.abort();
    messages.length = 0;
    $("chat-log").replaceChildren(el("p", { class: "quiet empty" }, "Say something."));
    text.focus();
  });
}

/** Offer what is configured; the choice stays as long as it exists. */
export function offerModels(names) {
  const select = $("chat-model");
  if ([...select.options].map((option) => option.value).join("\n") === names.join("\n")) return;
  const before = select.value;
  select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  if (names.includes(before)) select.value = before;
}

async function send(text) {
  const log = $("chat-log");
  const model = $("chat-model").value;
  messages.push({ role: "user", content: text.value });
  log.querySelector(".empty")?.remove();
  log.append(el("p", { class: "message user" }, text.value));
  text.value = "";
  const [thoughts, body, note] = [el("span", { class: "thoughts" }), el("span"), el("small")];
  const answer = el("p", { class: "message assistant" }, thoughts, body, note);
  answer.style.setProperty("--colour", serviceVariable(model));
  log.append(answer);
  abort = new AbortController();
  say($("chat-send"), "Stop");
  log.setAttribute("aria-busy", "true"); // readers wait for the whole answer
  try {
    await stream(model, thoughts, body, note, log);
    if (body.textContent) messages.push({ role: "assistant", content: body.textContent });
  } catch (error) {
    if (error.name === "AbortError") say(note, "stopped");
    else answer.append(el("small", { class: "message error" }, error.message));
  }
  abort = null;
  log.setAttribute("aria-busy", "false");
  say($("chat-send"), "Send");
}

async function stream(model, thoughts, body, note, log) {
  const began = performance.now();
  const response = await request(model);
  if (!response.ok) throw new Error(await complaint(response));
  let first = 0;
  say(note, "waiting");
  for await (const { choices, usage, error } of documents(response)) {
    if (error) throw new Error(error.message);
    const thought = choices[0]?.delta?.reasoning_content ?? "";
    const piece = choices[0]?.delta?.content ?? choices[0]?.text ?? "";
    const close = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
    if ((thought || piece) && !first) {
      first = performance.now();
      say(note, `${model} · first token ${seconds((first - began) / 1000)}`);
    }
    if (thought) thoughts.append(thought);
    if (piece) body.append(piece);
    if (usage) tell(note, model, usage.completion_tokens, first - began, performance.now() - first);
    if (close) log.scrollTop = log.scrollHeight;
  }
}

/** How it went; both times in milliseconds. */
function tell(note, model, tokens, first, rest) {
  const speed = tokens > 1 && rest > 0 ? ` · ${((1000 * (tokens - 1)) / rest).toFixed(0)} tokens/s` : "";
  say(note, `${model} · ${tokens} tokens · first after ${seconds(first / 1000)}${speed}`);
}

/** Ask as a chat; a model without a template is asked to continue the text. */
async function request(model) {
  const common = { model, stream: true, stream_options: { include_usage: true } };
  common.max_tokens = Number($("chat-tokens").value) || 256;
  common.temperature = Number($("chat-temperature").value);
  if (!plainModels.has(model)) {
    const response = await post("/v1/chat/completions", { ...common, messages });
    const trouble = response.status === 400 ? await complaint(response.clone()) : "";
    if (!trouble.includes("no chat template")) return response;
    plainModels.add(model);
  }
  return post("/v1/completions", { ...common, prompt: messages.at(-1).content });
}

function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal: abort.signal });
}
