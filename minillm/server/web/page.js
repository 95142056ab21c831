"use strict";
// A chat with the server that this page comes from, and a look at what its cache keeps of a text.

const BUDGETS = [["5 %", 0.05], ["10 %", 0.1], ["20 %", 0.2], ["100 %", "full"]]; // that are compared
const LOOK = 150; // milliseconds between two looks at a text that is being read
const LONG = 4000; // characters: what is pasted beyond becomes a file
const at = (id) => document.getElementById(id);
const percent = (x) => `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %`;
const share = (budget) => (budget <= 1 ? percent(budget) : `${budget} entries a head`);
const mib = (n) => (n < 1 << 20 ? `${(n / 1024).toFixed(0)} KiB` : `${(n / (1 << 20)).toFixed(1)} MiB`);

function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}

function button(text, act, name = "quiet") {
  const node = make("button", text, name);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

// What is kept in this browser

const store = {
  read(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(`minillm.${name}`)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  write(name, value) {
    try {
      localStorage.setItem(`minillm.${name}`, JSON.stringify(value));
    } catch {
      say("This browser keeps no more talks: delete some.");
    }
  },
};

let talks = store.read("talks", []);
let talk = talks[0] ?? begin();
let pending = []; // files that go with the next question
let running = null; // AbortController of the answer that is being written
let shown = null; // id of the file that the panel is about

function begin() {
  const fresh = { id: Date.now(), title: "New talk", messages: [] };
  talks.unshift(fresh);
  return fresh;
}

function keep() {
  talks = talks.filter((one) => one === talk || one.messages.length);
  store.write("talks", talks);
}

// Markdown: headings, lists, code, tables, bold; nodes of text, and never markup of the answer's own

function inline(text, into) {
  for (const part of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (/^`.+`$/.test(part)) into.append(make("code", part.slice(1, -1)));
    else if (/^\*\*.+\*\*$/.test(part)) into.append(make("strong", part.slice(2, -2)));
    else into.append(part);
  }
  return into;
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function markdown(text, into) {
  into.replaceChildren();
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    if (/^\s*```/.test(line)) {
      const end = lines.findIndex((other, j) => j > i && /^\s*```\s*$/.test(other));
      const code = make("pre");
      code.append(make("code", lines.slice(i + 1, end < 0 ? undefined : end).join("\n")));
      into.append(code);
      i = end < 0 ? lines.length : end + 1;
    } else if (/^#{1,6} /.test(line)) {
      into.append(inline(line.replace(/^#+ /, ""), make("h3")));
      i++;
    } else if (/^\s*([-*+]|\d+[.)]) /.test(line)) {
      const list = make(/^\s*\d/.test(line) ? "ol" : "ul");
      if (/^\s*\d/.test(line)) list.start = parseInt(line, 10);
      for (; i < lines.length && /^\s*([-*+]|\d+[.)]) /.test(lines[i]); i++)
        list.append(inline(lines[i].replace(/^\s*([-*+]|\d+[.)]) /, ""), make("li")));
      into.append(list);
    } else if (line.includes("|") && /^[\s|:-]*-[\s|:-]*$/.test(lines[i + 1] ?? "")) {
      const table = make("table");
      for (let head = true; i < lines.length && lines[i].includes("|"); i++, head = false) {
        const row = table.insertRow();
        for (const cell of cells(lines[i])) row.append(inline(cell, make(head ? "th" : "td")));
        if (head) i++;
      }
      into.append(table);
    } else if (!line.trim()) {
      i++;
    } else {
      const from = i;
      while (i < lines.length && lines[i].trim() && (i === from || !/^(\s*```|#{1,6} |\s*([-*+]|\d+[.)]) )/.test(lines[i]))) i++;
      into.append(inline(lines.slice(from, i).join("\n"), make("p")));
    }
  }
}

// The server

async function request(path, options = {}) {
  const key = store.read("settings", {}).key;
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...options.headers };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let message = `the server answered with ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {} // what stands between here and the server says it otherwise
  throw new Error(message);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.startsWith("data: ") && block.slice(6);
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function content(message) {
  if (!message.files?.length) return message.content;
  const parts = message.files.map((file) => ({ type: "file", file: { file_id: file.id } }));
  return [...parts, { type: "text", text: message.content }];
}

// Ask for an answer to some messages. tell(text, facts) is called as it grows. Returns {text, facts}.
async function answer(messages, budget, tell, signal) {
  const settings = store.read("settings", {});
  const body = {
    messages: messages.map((one) => ({ role: one.role, content: content(one) })),
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: settings.longest ?? 512,
    temperature: settings.temperature ?? 0.8,
    ...(budget && { kv: { budget: budget === "full" ? budget : Number(budget) } }),
  };
  if (settings.system) body.messages.unshift({ role: "system", content: settings.system });
  const start = performance.now();
  let text = "", first = 0, facts = "";
  const response = await request("/v1/chat/completions", {
    method: "POST", signal, body: JSON.stringify(body), headers: { "content-type": "application/json" },
  });
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const piece = chunk.choices[0]?.delta.content;
    if (piece) {
      first ||= performance.now() - start;
      text += piece;
    }
    if (chunk.timings) {
      const { cache_n: cached, prompt_n: read, predicted_per_second: speed } = chunk.timings;
      facts = `${speed.toFixed(1)} tok/s · first token after ${((first || performance.now() - start) / 1000).toFixed(1)} s · `;
      facts += `${cached} of ${cached + read} tokens were read before`;
    }
    tell(text, facts);
  }
  return { text, facts };
}

// The talk

function say(message) {
  const node = make("p", message, "error");
  at("talk").append(node);
  node.scrollIntoView({ block: "end" });
}

function drawList() {
  at("list").replaceChildren();
  for (const one of talks) {
    const item = make("li", undefined, one === talk ? "now" : "");
    const open = button(one.title, () => select(one), "quiet open");
    if (one === talk) open.setAttribute("aria-current", "true");
    const away = button("×", () => forget(one));
    away.setAttribute("aria-label", `Delete ${one.title}`);
    item.append(open, away);
    at("list").append(item);
  }
}

function select(one) {
  running?.abort();
  talk = one;
  keep();
  show("talks", false);
  draw();
}

function forget(one) {
  talks = talks.filter((other) => other !== one);
  if (one === talk) select(talks[0] ?? begin());
  keep();
  drawList();
}

function variant(one) {
  const node = make("div");
  const body = make("div", undefined, "body");
  node.append(make("h3", one.name), body, make("div", one.error ?? one.facts, one.error ? "foot error" : "foot"));
  markdown(one.text, body);
  if (one.waits) body.classList.add("wait");
  return node;
}

function bubble(message, index) {
  const node = make("article", undefined, `message ${message.role}`);
  const foot = make("div", undefined, "foot");
  if (message.variants) {
    const columns = make("div", undefined, "columns");
    columns.append(...message.variants.map(variant));
    node.append(columns);
  } else {
    const body = make("div", undefined, "body");
    for (const file of message.files ?? []) node.append(button(`▤ ${file.name}`, () => look(file.id, file.name), "tag"));
    if (message.role === "user") body.textContent = message.content;
    else markdown(message.content, body);
    if (message.waits) body.classList.add("wait");
    node.append(body);
    if (message.error) foot.append(make("span", message.error, "error"));
    if (message.facts) foot.append(make("span", message.facts));
    if (message.content) foot.append(button("Copy", () => navigator.clipboard?.writeText(message.content)));
  }
  if (!running && message.role === "user") foot.append(button("Edit", () => edit(index)));
  if (!running && message.role === "assistant" && index === talk.messages.length - 1)
    foot.append(button("Again", () => again(index)));
  if (foot.childNodes.length) node.append(foot);
  return node;
}

function draw() {
  drawList();
  const log = at("talk");
  log.replaceChildren(...talk.messages.map(bubble));
  if (!talk.messages.length) {
    const empty = make("div", undefined, "empty");
    empty.append(make("strong", "Ask about a long text."), "Drop a file here or paste it. It is read and compressed once; what the cache keeps of it shows beside the talk.");
    log.append(empty);
  }
  log.scrollTop = log.scrollHeight;
  at("send").hidden = Boolean(running);
  at("stop").hidden = !running;
}

function redraw(message) {
  const log = at("talk"), near = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const index = talk.messages.indexOf(message);
  if (index < 0) return; // of a talk that was left
  log.children[index].replaceWith(bubble(message, index));
  if (near) log.scrollTop = log.scrollHeight;
}

async function respond() {
  const messages = talk.messages.slice();
  const names = at("compare").checked ? BUDGETS : null;
  const message = { role: "assistant", content: "", waits: true };
  if (names) message.variants = names.map(([name]) => ({ name, text: "", facts: "", waits: true }));
  talk.messages.push(message);
  const mine = (running = new AbortController());
  draw();
  const write = async (into, budget) => {
    try {
      const found = await answer(messages, budget, (text, facts) => {
        into.text = text;
        into.facts = facts;
        if (!names) message.content = text;
        redraw(message);
      }, mine.signal);
      into.text = found.text;
    } catch (error) {
      if (error.name === "AbortError") into.facts = "stopped";
      else into.error = error.message;
    }
    delete into.waits;
  };
  if (names) await Promise.all(names.map(([, budget], i) => write(message.variants[i], budget)));
  else await write(message, store.read("settings", {}).budget);
  if (names) message.content = message.variants.at(-1).text; // with what the talk goes on
  delete message.waits;
  delete message.text;
  if (running === mine) running = null;
  keep();
  draw();
}

function ask(text) {
  if (running || !text.trim()) return;
  if (!talk.messages.length) talk.title = text.trim().slice(0, 60);
  talk.messages.push({ role: "user", content: text.trim(), files: pending });
  pending = [];
  drawFiles();
  respond();
}

function edit(index) {
  const message = talk.messages[index];
  talk.messages.length = index;
  pending = message.files ?? [];
  at("words").value = message.content;
  drawFiles();
  draw();
  grow();
  at("words").focus();
}

function again(index) {
  talk.messages.length = index;
  respond();
}

// Texts

function drawFiles() {
  at("files").replaceChildren();
  for (const file of pending) {
    const tag = make("span", `▤ ${file.name} `, "tag");
    const away = button("×", () => {
      pending = pending.filter((one) => one !== file);
      drawFiles();
    });
    away.setAttribute("aria-label", `Leave ${file.name} out`);
    tag.append(away);
    at("files").append(tag);
  }
}

async function upload(file) {
  const form = new FormData();
  form.append("purpose", "user_data");
  form.append("file", file, file.name);
  try {
    const { id } = await (await request("/v1/files", { method: "POST", body: form })).json();
    pending.push({ id, name: file.name });
    drawFiles();
    look(id, file.name);
  } catch (error) {
    say(`${file.name}: ${error.message}`);
  }
}

// Follow a text until it is read, and show what is kept of it.
async function look(id, name) {
  shown = id;
  show("cache", true);
  at("seen").hidden = false;
  at("document").replaceChildren();
  for (let n = 0; shown === id; n++) {
    let file, cache;
    try {
      file = (await (await request(`/v1/files/${id}`)).json()).minillm;
      if (file.state === "failed") throw new Error(file.error);
      if (file.state !== "queued") cache = await (await request(`/v1/cache/${id}`)).json();
    } catch (error) {
      at("about").textContent = `${name}: ${error.message}`;
      return;
    }
    if (shown !== id) return;
    if (cache) drawCache(name, cache);
    else at("about").textContent = `${name} waits for its turn.`;
    if (cache?.state === "ready") return drawDocument(cache);
    await new Promise((wake) => setTimeout(wake, LOOK));
  }
}

function drawCache(name, cache) {
  const n = cache.n_tokens, layers = cache.lengths.length, heads = cache.lengths[0].length;
  const ready = cache.state === "ready";
  at("about").textContent = ready
    ? `${name}: ${n.toLocaleString("en")} tokens, ${cache.method}${cache.budget ? ` at ${share(cache.budget)}` : ""}.`
    : `${name}: ${percent(cache.share)} of ${n.toLocaleString("en")} tokens read.`;
  const part = cache.bytes / (cache.full_bytes ?? 1);
  at("held").style.width = `${100 * (ready ? part : cache.share)}%`;
  const words = ready ? `${mib(cache.bytes)} held; a full cache takes ${mib(cache.full_bytes)}: ${percent(part)}` : `${mib(cache.bytes)} held now`;
  at("bytes").textContent = words;
  at("bar").setAttribute("aria-label", words);
  const map = at("map"), size = Math.max(6, Math.floor(360 / heads)), high = Math.max(5, Math.min(size, Math.floor(300 / layers)));
  map.width = heads * size;
  map.height = layers * high;
  const ink = map.getContext("2d"), colour = getComputedStyle(document.documentElement).getPropertyValue("--mark-rgb");
  cache.lengths.forEach((row, layer) => row.forEach((length, head) => {
    ink.fillStyle = `rgba(${colour}, ${0.06 + 0.94 * Math.min(1, length / n)})`;
    ink.fillRect(head * size, layer * high, size - 1, high - 1);
  }));
  map.onpointermove = (event) => {
    const layer = Math.floor(event.offsetY / map.clientHeight * layers), head = Math.floor(event.offsetX / map.clientWidth * heads);
    const length = cache.lengths[layer]?.[head];
    if (length !== undefined) at("hover").textContent = `layer ${layer}, head ${head}: ${length.toLocaleString("en")} entries, ${percent(length / n)}`;
  };
}

function drawDocument(cache) {
  const n = cache.lengths.length * cache.lengths[0].length, most = Math.max(...cache.kept, 1e-9);
  const text = document.createDocumentFragment();
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--mark-rgb");
  cache.tokens.forEach((token, i) => {
    const word = make("span", token);
    word.style.backgroundColor = `rgba(${colour}, ${(0.75 * cache.kept[i] / most).toFixed(3)})`;
    word.dataset.heads = Math.round(cache.kept[i] * n);
    text.append(word);
  });
  at("document").replaceChildren(text);
  at("document").onpointerover = ({ target }) => {
    if (target.dataset.heads) at("hover").textContent = `“${target.textContent.trim()}” is held by ${target.dataset.heads} of ${n} heads`;
  };
}

// Controls

function show(id, on) {
  at(id).classList.toggle("shown", on);
  at(`show-${id}`).setAttribute("aria-expanded", String(on));
  if (on) for (const other of ["talks", "cache"]) if (other !== id) show(other, false);
}

function grow() {
  const words = at("words");
  words.style.height = "auto";
  words.style.height = `${words.scrollHeight}px`;
}

function settings() {
  const now = store.read("settings", {});
  const fields = { budget: "", temperature: 0.8, longest: 512, system: "", key: "" };
  for (const [name, usual] of Object.entries(fields)) {
    const field = at(name);
    field.value = now[name] ?? usual;
    field.addEventListener("input", () => {
      const number = field.type === "range" || field.type === "number";
      store.write("settings", { ...store.read("settings", {}), [name]: number ? Number(field.value) || 0 : field.value });
      at("heat").textContent = at("temperature").value;
    });
  }
  at("heat").textContent = at("temperature").value;
}

async function greet() {
  try {
    const { model_alias: model, kv, default_generation_settings: { n_ctx } } = await (await request("/props")).json();
    const budget = kv.budget ? `, ${share(kv.budget)} of the cache kept` : "";
    at("model").textContent = `${model} · ${n_ctx.toLocaleString("en")} tokens · ${kv.method}${budget}`;
  } catch (error) {
    at("model").textContent = error.message;
  }
}

for (const id of ["talks", "cache"])
  at(`show-${id}`).addEventListener("click", () => show(id, !at(id).classList.contains("shown")));
at("new").addEventListener("click", () => {
  select(talk.messages.length ? begin() : talk);
  at("words").focus();
});
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  const text = at("words").value;
  at("words").value = "";
  grow();
  ask(text);
});
at("stop").addEventListener("click", () => running?.abort());
at("words").addEventListener("input", grow);
at("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("words").addEventListener("paste", (event) => {
  const text = event.clipboardData.getData("text/plain");
  if (text.length <= LONG) return;
  event.preventDefault();
  upload(new File([text], "pasted.txt", { type: "text/plain" }));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("attach").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => {
  for (const file of at("file").files) upload(file);
  at("file").value = "";
});
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]])
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.querySelector("main").classList.toggle("over", over);
    if (name === "drop") for (const file of event.dataTransfer.files) upload(file);
  });

settings();
greet();
draw();
