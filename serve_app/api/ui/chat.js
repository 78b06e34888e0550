// The chat: /v1/chat/completions, streamed, and a crowd of prompts to fill the steps with. Knows nothing of replicas.

import { refusal, serverEvents } from "./feed.js";

const CROWD = 12;
const CROWD_TOKENS = [40, 80, 160];
const WORDS = "The ship sailed past the old harbour while seven grey gulls counted the waves beneath a quiet morning sky".split(" ");

const $ = (id) => document.getElementById(id);
const random = (from, to) => from + Math.floor(Math.random() * (to - from + 1));

const someWords = (number) => Array.from({ length: number }, () => WORDS[random(0, WORDS.length - 1)]).join(" ");

/** A request id that the feed shows as it is, so that the picture can mark it. */
function newId(own) {
  const id = crypto.getRandomValues(new Uint32Array(1))[0];
  own.add(id);
  return `ui-${id.toString(16).padStart(8, "0")}`;
}

/** Streams one answer; `take(delta, usage)` for each event. Returns why it ended. Raises an Error with the server's words. */
async function ask(messages, options, headers, own, signal, take) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(), "content-type": "application/json", "x-request-id": newId(own) },
    body: JSON.stringify({
      messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, ...options,
    }),
    signal,
  });
  if (!response.ok) {
    const error = new Error(await refusal(response));
    error.status = response.status;
    throw error;
  }
  let reason = null;
  for await (const data of serverEvents(response)) {
    if (data === "[DONE]") return reason;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    take(choice?.delta ?? {}, event.usage);
    reason = choice?.finish_reason ?? reason;
  }
  throw new Error("the stream broke off");
}

export class Chat {
  #messages = [];
  #abort = null;

  constructor(headers, own, askForKey) {
    this.headers = headers;
    this.own = own;
    this.askForKey = askForKey;
    $("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("chat-form").requestSubmit();
    });
    $("stop").addEventListener("click", () => this.#abort?.abort());
    $("clear").addEventListener("click", () => this.clear());
    $("crowd").addEventListener("click", () => this.crowd());
  }

  #show(who, text, className) {
    const item = document.createElement("li");
    item.className = className;
    const name = document.createElement("b");
    name.textContent = who;
    item.append(name, text);
    $("messages").append(item);
    return item;
  }

  #setRunning(isRunning) {
    const hadFocus = document.activeElement === $("stop") || document.activeElement === $("send");
    $("send").disabled = isRunning;
    $("stop").disabled = !isRunning;
    if (hadFocus) $(isRunning ? "stop" : "prompt").focus();
    // Read out as a whole, when it is whole.
    $("messages").setAttribute("aria-busy", String(isRunning));
  }

  clear() {
    this.#abort?.abort();
    this.#messages = [];
    $("messages").replaceChildren();
    $("speed").textContent = "";
    $("prompt").focus();
  }

  async send() {
    const text = $("prompt").value.trim();
    if (this.#abort || !text) return;
    $("prompt").value = "";
    const messages = [...this.#messages, { role: "user", content: text }];
    this.#messages = messages;
    this.#show("You", text, "user");
    const item = this.#show("Model", "", "model");
    const options = $("max-tokens").value ? { max_tokens: Number($("max-tokens").value) } : {};
    this.#abort = new AbortController();
    this.#setRunning(true);
    const answer = new Answer(item);
    try {
      const reason = await ask(messages, options, this.headers, this.own, this.#abort.signal, (delta, usage) => answer.take(delta, usage));
      answer.end(reason === "length" ? "most tokens reached" : "");
    } catch (error) {
      if (error.name === "AbortError") answer.end("stopped");
      else {
        answer.end("failed");
        item.classList.add("bad");
        item.append(error.message);
        if (error.status === 401) this.askForKey();
      }
    }
    if (this.#messages === messages) this.#messages = [...messages, { role: "assistant", content: answer.text }];
    this.#abort = null;
    this.#setRunning(false);
  }

  /** Prompts of many lengths at once, in a few requests: a browser opens six connections to a server and no more. */
  async crowd() {
    const state = $("crowd-state");
    const prompts = () => Array.from({ length: CROWD / CROWD_TOKENS.length }, (_, i) => someWords(i ? random(4, 24) : random(60, 160)));
    let [done, problem] = [0, ""];
    const tell = () => {
      state.textContent = `${done} of ${CROWD} answered${problem && `; ${problem}`}`;
    };
    tell();
    await Promise.all(
      CROWD_TOKENS.map(async (tokens) => {
        const prompt = prompts();
        const response = await fetch("v1/completions", {
          method: "POST",
          headers: { ...this.headers(), "content-type": "application/json" },
          body: JSON.stringify({ prompt, max_tokens: random(tokens / 2, tokens), ignore_eos: true, temperature: 1 }),
        }).catch(() => null);
        if (response?.ok) {
          await response.arrayBuffer();
          done += prompt.length;
        } else {
          problem = response ? await refusal(response) : "the server does not answer";
          if (response?.status === 401) this.askForKey();
        }
        tell();
      }),
    );
  }
}

/** One answer as it grows, and its speed. Text goes to the screen once for each frame. */
class Answer {
  #shown = 0;
  #isDue = false;

  constructor(item) {
    this.item = item;
    this.text = "";
    this.reasoning = "";
    this.ending = "";
    this.tokens = 0;
    this.startedAt = performance.now();
    this.firstAt = null;
    this.lastAt = null;
  }

  take(delta, usage) {
    if (usage && usage.completion_tokens > this.tokens) {
      this.lastAt = performance.now();
      this.firstTokens ??= usage.completion_tokens;
      this.firstAt ??= this.lastAt;
      this.tokens = usage.completion_tokens;
    }
    this.reasoning += delta.reasoning_content ?? "";
    this.text += delta.content ?? "";
    if (this.#isDue) return;
    this.#isDue = true;
    requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    this.#isDue = false;
    if (this.reasoning) {
      if (!this.thought) {
        this.thought = document.createElement("span");
        this.thought.className = "reasoning";
        this.item.firstChild.after(this.thought);
      }
      this.thought.textContent = this.reasoning;
    }
    const list = this.item.parentNode;
    const isAtEnd = list && list.scrollHeight - list.scrollTop - list.clientHeight < 60;
    this.item.append(this.text.slice(this.#shown));
    this.#shown = this.text.length;
    if (isAtEnd) list.scrollTop = list.scrollHeight;
    $("speed").textContent = this.#speed();
  }

  end(words) {
    this.ending = words; // kept: a frame asked for before the end may come after it
    this.#paint();
    this.item.normalize();
  }

  #speed() {
    return [this.#figures(), this.ending].filter(Boolean).join("; ");
  }

  #figures() {
    if (this.firstAt === null) return "";
    const seconds = (this.lastAt - this.firstAt) / 1000;
    const rate = seconds > 0 ? `, ${((this.tokens - this.firstTokens) / seconds).toFixed(1)} tokens/s` : "";
    return `${this.tokens} tokens${rate}, the first after ${Math.round(this.firstAt - this.startedAt)} ms`;
  }
}
