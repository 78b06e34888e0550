// The stream at ui/events, and server-sent events in general. Knows fetch; knows nothing of what is told.

/** The data of each event in a response's body. fetch, since an EventSource sends no API key. */
export async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What a refusal says, as one sentence. */
export async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

/** Reads the feed until it is stopped, and again whenever it ends. `say(state, words)`: connected, waiting or key. */
export class Feed {
  #abort = null;

  constructor(headers, take, say) {
    this.headers = headers;
    this.take = take;
    this.say = say;
  }

  get isOn() {
    return this.#abort !== null;
  }

  start() {
    if (this.#abort) return;
    this.#abort = new AbortController();
    this.#run(this.#abort.signal);
  }

  stop() {
    this.#abort?.abort();
    this.#abort = null;
  }

  async #run(signal) {
    let pause = 500;
    while (!signal.aborted) {
      let words = "The server does not answer.";
      try {
        const response = await fetch("ui/events", { headers: this.headers(), signal, cache: "no-store" });
        if (response.status === 401) {
          this.stop();
          this.say("key", await refusal(response));
          return;
        }
        if (response.ok) {
          for await (const data of serverEvents(response)) {
            pause = 500;
            this.take(JSON.parse(data));
          }
          words = "";
        } else {
          words = await refusal(response);
          pause = Math.max(pause, 1000 * Number(response.headers.get("retry-after") ?? 0));
        }
      } catch (error) {
        if (signal.aborted) return;
        if (!(error instanceof TypeError || error.name === "AbortError")) throw error; // not the network
      }
      if (words) this.say("waiting", words);
      await new Promise((wake) => setTimeout(wake, pause));
      pause = Math.min(2 * pause, 8000);
    }
  }
}
