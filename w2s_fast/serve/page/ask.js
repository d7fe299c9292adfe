// The page's two ways: a form that asks this server, or saved traces that it came with.

const tree = new Tree();
const saved = JSON.parse(at("data").textContent);
const NUMBERS = ["beam_width", "successors", "chunk_length", "max_tokens", "temperature", "top_k", "seed"];
let running = null;

function settings() {
  const body = { method: at("method").value };
  for (const name of NUMBERS) {
    const { value } = at(name);
    if (value !== "") body[name] = Number(value);
  }
  if (body.method === "sample" || body.method === "fusion") for (const name of ["beam_width", "successors", "chunk_length"]) delete body[name];
  return body;
}

async function* events(route, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const answer = await fetch(route, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!answer.ok) {
    if (answer.status === 401) at("key-label").hidden = false;
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function plain(prompt, body, signal) {
  const own = { prompt, method: "sample", stream: true };
  for (const name of ["max_tokens", "temperature", "top_k", "seed"]) if (name in body) own[name] = body[name];
  const begin = performance.now();
  at("plain").replaceChildren(element("span", { className: "prompt", textContent: prompt }));
  at("plain-facts").textContent = "";
  const text = element("span");
  at("plain").append(text);
  for await (const event of events("v1/completions", own, signal)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) text.textContent += choice.text;
  }
  at("plain-facts").textContent = `${((performance.now() - begin) / 1000).toFixed(2)} s`;
}

async function steered(prompt, body, signal) {
  for await (const event of events("live", { prompt, ...body }, signal)) tree.take(event);
}

async function search() {
  running?.abort();
  const own = running = new AbortController();
  const prompt = at("prompt").value, body = settings();
  at("go").disabled = true;
  at("stop").disabled = false;
  at("error").hidden = true;
  at("chosen").replaceChildren();
  try {
    await Promise.all([steered(prompt, body, own.signal), plain(prompt, body, own.signal)]);
  } catch (error) {
    own.abort();
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    if (running === own) {
      running = null;
      at("go").disabled = false;
      at("stop").disabled = true;
    }
  }
}

function show(which) {
  for (const event of saved.searches[which].events) tree.take(event);
}

if (saved) {
  at("model").textContent = saved.title;
  at("pick").hidden = saved.searches.length < 2;
  saved.searches.forEach((one, i) => at("searches").append(new Option(one.title, String(i))));
  at("searches").addEventListener("change", () => show(Number(at("searches").value)));
  if (saved.searches.length) show(0);
} else {
  at("ask").hidden = false;
  at("plain-section").hidden = false;
  fetch("live").then((answer) => answer.json()).then((about) => {
    at("model").textContent = about.model;
    for (const [name, value] of Object.entries(about.defaults)) if (at(name) && value !== null) at(name).value = value;
  }).catch(() => {});
  at("ask").addEventListener("submit", (event) => { event.preventDefault(); search(); });
  at("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) search();
    if (event.key === "Escape") running?.abort();
  });
  at("prompt").focus();
}
