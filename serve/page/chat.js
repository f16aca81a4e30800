// A conversation with this server's /v1/chat/completions. Text of the model is only ever put into
// text nodes, and the API key stays in its field.

const byId = (id) => document.getElementById(id);
const [conversation, form, prompt, key] = ["conversation", "form", "prompt", "key"].map(byId);
const FINISHES = {
  length: "cut off: the context is full",
  insufficient_system_resource: "ended early by the server",
};

let messages = [];
let running = null; // the AbortController of the present answer

async function request(path, body, signal) {
  const headers = { "content-type": "application/json" };
  if (key.value) headers.authorization = `Bearer ${key.value}`;
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  if (response.ok) return response;
  if (response.status === 401) byId("key-label").hidden = false;
  const text = await response.text();
  let message = text;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // Something between here and the server answered.
  }
  throw new Error(message || `The server answered with status ${response.status}.`);
}

async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", done = false; !done; ) {
    const part = await reader.read();
    done = part.done;
    const lines = (rest + (part.value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice("data: ".length));
    }
  }
  throw new Error("The connection ended before the answer did.");
}

function add(parent, tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.append(document.createTextNode(text));
  parent.append(element);
  return element;
}

// Grows a text, and keeps its end in view unless the reader has scrolled away from it.
function grow(element, text) {
  const below = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight;
  element.firstChild.appendData(text);
  if (below < 50) conversation.scrollTop = conversation.scrollHeight;
}

// The texts of an answer, shown as they arrive.
class Answer {
  content = "";

  constructor() {
    this.article = add(conversation, "article", "assistant");
    this.article.ariaBusy = "true"; // read aloud once it is whole
    this.text = add(this.article, "p", "content");
    this.began = performance.now();
  }

  read(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const [{ delta, finish_reason }] = chunk.choices;
    if (delta.reasoning_content) this.think(delta.reasoning_content);
    if (delta.content) {
      this.endThinking();
      this.content += delta.content;
      grow(this.text, delta.content);
    }
    if (delta.reasoning_content || delta.content) this.first ??= performance.now();
    this.finish = finish_reason ?? this.finish;
    this.usage = chunk.usage ?? this.usage;
  }

  think(text) {
    if (!this.thoughts) {
      const details = add(this.article, "details", "thinking");
      this.text.before(details);
      this.summary = add(details, "summary", "", "Thinking\u2026");
      this.thoughts = add(details, "div", "");
    }
    grow(this.thoughts, text);
  }

  endThinking() {
    if (this.summary?.textContent !== "Thinking\u2026") return;
    const seconds = (performance.now() - this.began) / 1000;
    this.summary.textContent = `Thought for ${seconds.toFixed(1)} s`;
  }

  end(...notes) {
    this.endThinking();
    this.article.ariaBusy = "false";
    grow(add(this.article, "p", "facts"), notes.filter(Boolean).join(" \u00b7 "));
  }

  facts() {
    if (!this.usage) return [];
    const { completion_tokens: tokens, prompt_tokens, prompt_cache_hit_tokens } = this.usage;
    const seconds = (performance.now() - this.first) / 1000;
    return [
      FINISHES[this.finish],
      `${tokens} tokens`,
      tokens > 1 && seconds > 0 && `${((tokens - 1) / seconds).toFixed(1)} tokens/s`,
      `cache hit: ${prompt_cache_hit_tokens} of ${prompt_tokens} prompt tokens`,
    ];
  }
}

// The share of drafts that were right, over all requests since the server started.
async function acceptance() {
  const text = await (await request("/metrics")).text();
  const count = (name) => {
    const line = text.split("\n").find((row) => row.startsWith(`vllm:spec_decode_num_${name}`));
    return Number(line?.split(" ").pop() ?? 0);
  };
  const drafted = count("draft_tokens_total");
  const share = (100 * count("accepted_tokens_total")) / drafted;
  return drafted > 0 && `drafts accepted by this server: ${share.toFixed(0)}%`;
}

async function send(text) {
  const { signal } = (running = new AbortController());
  const mine = messages;
  mine.push({ role: "user", content: text });
  add(add(conversation, "article", "user"), "p", "", text).scrollIntoView();
  const answer = new Answer();
  showRunning(true);
  try {
    const body = {
      model: byId("model").value,
      messages: mine,
      reasoning_effort: byId("effort").value,
      temperature: byId("temperature").valueAsNumber,
      stream: true,
    };
    const response = await request("/v1/chat/completions", body, signal);
    for await (const chunk of chunks(response)) answer.read(chunk);
    const facts = answer.facts();
    answer.end(...facts, await acceptance());
  } catch (error) {
    answer.end(signal.aborted && "stopped");
    if (!signal.aborted) grow(add(answer.article, "p", "error"), error.message);
  }
  if (answer.content || answer.finish) {
    mine.push({ role: "assistant", content: answer.content });
  } else {
    mine.pop(); // to be sent again, perhaps changed
    if (mine === messages) prompt.value ||= text;
  }
  running = null;
  showRunning(false);
}

function showRunning(isRunning) {
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  if (document.activeElement === document.body) prompt.focus();
}

async function loadModels() {
  try {
    const { data } = await (await request("/v1/models")).json();
    byId("model").replaceChildren(...data.map(({ id }) => new Option(id)));
  } catch (error) {
    grow(add(add(conversation, "article", ""), "p", "error"), error.message);
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value;
  if (running || !text.trim()) return;
  prompt.value = "";
  send(text);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  conversation.replaceChildren();
  prompt.focus();
});
key.addEventListener("change", loadModels);
loadModels();
