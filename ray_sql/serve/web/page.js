// The page of the service. Whatever comes from a server is written as text, never as HTML.

const MOST_ROWS = 500;
const MOST_HISTORY = 50;
const MOST_TRIES = 10;
const PAUSE_S = 2;
const MOST_PAUSE_S = 30;
const MOST_CHARACTERS = 2000;
const SLOW_MS = 1500;
const NARROW = "(max-width: 860px)";
const TOKEN = "ray_sql.token";
const HISTORY = "ray_sql.history";
const DATABASE = "ray_sql.database";

const at = (id) => document.getElementById(id);
const wait = (ms, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, ms);
  signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); });
});

function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content.map(String));
  return element;
}

function show(id, shown) {
  at(id).hidden = !shown;
}

// --- what the server is asked ---

class Refusal extends Error {
  constructor(message, status, pause = PAUSE_S) {
    super(message);
    this.status = status;
    this.pause = pause;
  }
}

async function call(path, body, signal) {
  const headers = { Accept: "application/json" };
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  let response, text;
  try {
    const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
    response = await fetch(path, body ? { ...options, body: JSON.stringify(body) } : options);
    text = await response.text();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal("The server does not answer. Look whether it runs, and try again.", 0);
  }
  const pause = Math.min(Number(response.headers.get("Retry-After")) || PAUSE_S, MOST_PAUSE_S);
  let value;
  try {
    value = JSON.parse(text, exact);
  } catch { // what stands before the service, such as a proxy, has words of its own
    throw new Refusal(`The server answered something else (HTTP ${response.status}).`, response.status, pause);
  }
  if (response.ok) return value;
  throw new Refusal(reasonOf(value, response.status), response.status, pause);
}

// Numbers that JavaScript cannot hold stay as they were written.
function exact(_, value, context) {
  const rounded = typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value);
  return rounded && context?.source ? context.source : value;
}

function reasonOf(value, status) {
  if (value?.error?.message) return value.error.message;
  if (Array.isArray(value?.detail)) return value.detail.map((one) => one.msg).join("; ");
  return `The server refused (HTTP ${status}).`;
}

// --- one thing at a time: its clock, its cancelling, its mistakes ---

let current = null;

async function work(words, task, retry) {
  current?.abort();
  const own = (current = new AbortController());
  const began = Date.now();
  show("problem", false);
  show("empty", false);
  at("doing").textContent = words;
  const tick = () => {
    const passed = Date.now() - began;
    at("clock").textContent = passed < SLOW_MS ? "" : `${Math.round(passed / 1000)} s`;
    show("cancel", passed >= SLOW_MS);
  };
  tick();
  show("status", true);
  at("answer").setAttribute("aria-busy", "true");
  const clock = setInterval(tick, 500);
  try {
    return await patiently(words, task, own.signal);
  } catch (error) {
    if (current === own && !own.signal.aborted) fail(error, retry);
    return null;
  } finally {
    clearInterval(clock);
    if (current === own) {
      current = null;
      show("status", false);
      at("answer").removeAttribute("aria-busy");
    }
  }
}

async function patiently(words, task, signal) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await task(signal);
    } catch (error) {
      if (error.status !== 503 || tries === MOST_TRIES) throw error;
      at("doing").textContent = "Many are asking. Yours is sent again in a moment.";
      await wait(error.pause * 1000, signal);
      at("doing").textContent = words;
    }
  }
}

function fail(error, retry) {
  if (error.status === 401) return askForToken("The server does not know this token.");
  if (!(error instanceof Refusal)) console.error(error);
  at("reason").textContent = error instanceof Refusal ? error.message : `The page failed: ${error.message}`;
  at("again").onclick = retry;
  show("problem", true);
  return null;
}

// --- the door ---

function askForToken(problem) {
  const had = sessionStorage.getItem(TOKEN) !== null;
  sessionStorage.removeItem(TOKEN);
  show("frame", false);
  show("forget", false);
  show("door", true);
  at("door-problem").textContent = problem;
  show("door-problem", had);
  at("token").value = "";
  at("token").focus();
}

at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = at("token").value.trim();
  sessionStorage.setItem(TOKEN, /^[\x21-\x7e]+$/.test(token) ? token : "-");
  begin();
});
at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  location.reload();
});

// --- databases and their schemas ---

let service = null;
let schema = null;

async function begin() {
  show("door", false);
  show("frame", true);
  const found = await work("Looking for databases", (signal) => call("v1/databases", null, signal), begin);
  if (!found) return;
  service = found;
  show("empty", true);
  at("model").textContent = service.model;
  show("sql-choices", service.task === "sql");
  show("forget", sessionStorage.getItem(TOKEN) !== null);
  at("database").replaceChildren(...service.databases.map((name) => make("option", "", name)));
  const none = service.databases.length === 0;
  for (const id of ["database", "question", "ask"]) at(id).disabled = none;
  show("schema-box", !none);
  if (none) {
    at("empty").textContent = "This server has no database. Start it with --serve.databases.";
    return;
  }
  const before = sessionStorage.getItem(DATABASE);
  if (service.databases.includes(before)) at("database").value = before;
  at("schema-box").open = !matchMedia(NARROW).matches;
  showHistory();
  await choose();
  if (!matchMedia(NARROW).matches) at("question").focus(); // a phone would show its keyboard
}

async function choose() {
  const name = at("database").value;
  sessionStorage.setItem(DATABASE, name);
  schema = null;
  clearAnswer();
  at("schema").replaceChildren();
  at("size").textContent = "";
  const path = `v1/databases/${encodeURIComponent(name)}`;
  const found = await work("Reading the schema", (signal) => call(path, null, signal), choose);
  if (!found) return;
  schema = found;
  show("empty", true);
  drawSchema();
  const first = schema.tables[0]?.name ?? "rows";
  at("question").placeholder = `e.g. How many ${first.replaceAll("_", " ")} are there?`;
}

function drawSchema() {
  const many = schema.tables.length;
  at("size").textContent = `${many} ${many === 1 ? "table" : "tables"}`;
  at("filter").value = "";
  show("nothing", false);
  const tables = schema.tables.map(drawTable);
  if (many <= 6) tables.forEach((table) => { table.open = true; });
  const left = schema.left_out.map((line) => make("p", "soft", `Left out: ${line}`));
  at("schema").replaceChildren(...tables, ...left);
}

function drawTable(table) {
  const box = make("details", "table");
  const title = make("summary", "", table.name);
  title.append(make("span", "soft", table.is_view ? "  view" : ""));
  const columns = make("ul");
  for (const column of table.columns) {
    const line = make("li");
    line.append(make("span", "name", column.name), make("span", "kind", column.type.toLowerCase()));
    if (column.primary_key) {
      const key = make("span", "key", "KEY");
      key.title = "part of the primary key";
      line.append(key);
    }
    for (const target of column.references) line.append(make("span", "to", `→ ${target}`));
    line.dataset.name = column.name;
    columns.append(line);
  }
  box.dataset.name = table.name;
  box.append(title, columns);
  return box;
}

function highlight(links) {
  for (const old of at("schema").querySelectorAll(".used")) {
    old.classList.remove("used");
    old.querySelector(".unseen")?.remove();
  }
  for (const table of at("schema").querySelectorAll(".table")) {
    const name = table.dataset.name;
    if (!Object.hasOwn(links ?? {}, name)) continue;
    const columns = links[name];
    table.open = true;
    table.classList.add("used");
    table.firstElementChild.append(make("span", "unseen", " (used by this answer)"));
    for (const line of table.querySelectorAll("li")) {
      if (!columns.includes(line.dataset.name)) continue;
      line.classList.add("used");
      line.append(make("span", "unseen", " (used by this answer)"));
    }
  }
  at("schema").querySelector(".used")?.scrollIntoView({ block: "nearest" });
}

function filter() {
  const wanted = at("filter").value.trim().toLowerCase();
  let found = 0;
  for (const table of at("schema").querySelectorAll(".table")) {
    const own = table.dataset.name.toLowerCase().includes(wanted);
    let columns = 0;
    for (const line of table.querySelectorAll("li")) {
      line.hidden = !own && !line.dataset.name.toLowerCase().includes(wanted);
      columns += !line.hidden;
    }
    table.hidden = !own && columns === 0;
    found += !table.hidden;
    if (wanted && !table.hidden) table.open = true;
  }
  show("nothing", found === 0);
}

at("database").addEventListener("change", choose);
at("filter").addEventListener("input", filter);

// --- a question and its answer ---

let answered = null;

async function ask() {
  const question = at("question").value.trim();
  if (!question || !schema) return at("question").focus();
  const body = { question, database: schema.name, execute: schema.runs, max_rows: MOST_ROWS };
  const evidence = at("evidence").value.trim();
  if (evidence) body.evidence = evidence;
  const samples = Number(at("samples").value);
  if (samples > 1) Object.assign(body, { samples, choose: "vote" });
  if (at("repair").checked) {
    body.ground = "repair";
    body.choose ??= "repaired"; // votes count mended answers; one answer is mended itself
  }
  clearAnswer();
  const reply = await work("Writing SQL", (signal) => call("v1/sql", body, signal), ask);
  if (!reply) return;
  answered = { question, evidence, database: reply.database, sql: reply.sql ?? "" };
  remember(reply);
  showAnswer(reply);
  if (matchMedia(NARROW).matches) {
    at("question").blur(); // its keyboard would cover the answer
    at("answer").scrollIntoView();
  }
}

function clearAnswer() {
  answered = null;
  show("answer", false);
  show("problem", false);
  highlight(null);
}

function showAnswer(reply) {
  const writesSql = service.task === "sql";
  at("asked").textContent = answered.question;
  show("query", writesSql);
  show("wrong", service.saves);
  show("run", schema.runs);
  closeCorrecting();
  setSql(answered.sql);
  at("warnings").replaceChildren(...(reply.warnings ?? []).map((words) => make("li", "", `Note: ${words}`)));
  showCandidates(reply);
  showResult(reply);
  if (!writesSql) at("facts").prepend(`${named(reply.links)} · `);
  show("answer", true);
}

function named(links) {
  const tables = Object.entries(links ?? {});
  if (!tables.length) return "No table was named";
  return `Needs ${tables.map(([table, columns]) => `${table} (${columns.join(", ") || "any column"})`).join(", ")}`;
}

function showCandidates(reply) {
  const counts = new Map();
  for (const sql of reply.candidates ?? []) if (sql) counts.set(sql, (counts.get(sql) ?? 0) + 1);
  const lines = [...counts].map(([sql, count]) => {
    const line = make("li");
    const button = make("button", "quiet", sql);
    button.type = "button";
    button.addEventListener("click", () => { setSql(sql); run(); });
    line.append(make("span", "soft", `${count}×`), button);
    return line;
  });
  at("others-title").textContent = `Candidates (${reply.candidates?.length ?? 0} drawn, ${counts.size} different)`;
  at("candidates").replaceChildren(...lines);
  show("others", lines.length > 0);
}

function showResult(result) {
  const facts = [];
  const { answer_seconds: writing, query_seconds: running } = result.timings;
  at("facts").classList.toggle("failed", Boolean(result.error));
  if (result.error) facts.push(`Not run: ${result.error}`);
  if (result.rows) facts.push(counted(result));
  if (writing !== undefined) facts.push(`written in ${seconds(writing)}`);
  if (running !== undefined && !result.error) facts.push(`run in ${seconds(running)}`);
  at("facts").textContent = facts.join(" · ");
  at("said").textContent = result.error ?? (result.rows ? `Answered: ${counted(result)}` : "Answered");
  show("scroll", Boolean(result.rows?.length));
  if (result.rows) drawRows(result);
  highlight(result.links);
}

function counted(result) {
  const total = result.row_count;
  const words = `${total.toLocaleString()} ${total === 1 ? "row" : "rows"}`;
  return result.rows.length < total ? `the first ${result.rows.length} of ${words}` : words;
}

function seconds(value) {
  return value < 1 ? `${Math.max(1, Math.round(value * 1000))} ms` : `${value.toFixed(1)} s`;
}

function drawRows({ columns, rows }) {
  const numbers = columns.map((_, index) =>
    rows.some((row) => row[index] !== null) &&
    rows.every((row) => row[index] === null || typeof row[index] === "number"));
  const head = make("thead").appendChild(make("tr"));
  columns.forEach((name, index) => {
    const cell = make("th", numbers[index] ? "number" : "", name);
    cell.scope = "col";
    head.append(cell);
  });
  const body = make("tbody");
  for (const row of rows) {
    const line = make("tr");
    row.forEach((value, index) => {
      const kind = value === null ? "null" : "";
      line.append(make("td", numbers[index] ? `number ${kind}` : kind, shown(value)));
    });
    body.append(line);
  }
  at("rows").replaceChildren(head.parentElement, body);
}

function shown(value) {
  const text = String(value ?? "NULL");
  return text.length > MOST_CHARACTERS ? `${text.slice(0, MOST_CHARACTERS)}…` : text;
}

at("asking").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
at("cancel").addEventListener("click", stop);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });

function stop() {
  if (!current) return;
  current.abort();
  at("question").focus();
}

// --- the SQL: painted, edited, run ---

const PARTS = new RegExp([
  "(?<string>'(?:[^']|'')*'?)",
  '(?<name>"(?:[^"]|"")*"?|`[^`]*`?)',
  "(?<note>--[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$))",
  "\\b(?<word>SELECT|DISTINCT|FROM|WHERE|GROUP|ORDER|BY|HAVING|LIMIT|OFFSET|JOIN|INNER|LEFT|RIGHT|FULL|OUTER|CROSS|NATURAL|ON|USING|AS|AND|OR|NOT|IN|IS|NULL|LIKE|ILIKE|BETWEEN|EXISTS|CASE|WHEN|THEN|ELSE|END|UNION|ALL|INTERSECT|EXCEPT|WITH|RECURSIVE|VALUES|ASC|DESC|CAST|OVER|PARTITION)\\b",
].join("|"), "gi");

function paint() {
  const sql = at("sql").value;
  const pieces = [];
  let end = 0;
  for (const match of sql.matchAll(PARTS)) {
    const kind = ["string", "note", "word"].find((name) => match.groups[name] !== undefined) ?? "";
    pieces.push(sql.slice(end, match.index), make("span", kind, match[0]));
    end = match.index + match[0].length;
  }
  at("painted").replaceChildren(...pieces, sql.slice(end), "\n");
  show("reset", answered !== null && sql !== answered.sql);
}

function setSql(sql) {
  at("sql").value = sql;
  paint();
}

async function run() {
  const sql = at("sql").value.trim();
  if (!sql || !answered || !schema?.runs) return;
  const body = { sql, database: answered.database, max_rows: MOST_ROWS };
  const result = await work("Running the SQL", (signal) => call("v1/run", body, signal), run);
  if (result && answered) showResult(result);
}

at("sql").addEventListener("input", paint);
at("sql").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  run();
});
at("run").addEventListener("click", run);
at("reset").addEventListener("click", () => setSql(answered.sql));
at("copy").addEventListener("click", async () => {
  await copy(at("sql"));
  at("copy").textContent = "Copied";
  setTimeout(() => { at("copy").textContent = "Copy"; }, 1500);
});

// Addresses without TLS have no clipboard: there the field's own text is copied.
async function copy(field) {
  try {
    await navigator.clipboard.writeText(field.value);
  } catch {
    field.select();
    document.execCommand("copy");
  }
}

// --- what was wrong ---

function closeCorrecting() {
  show("correcting", false);
  at("wrong").setAttribute("aria-expanded", "false");
  at("correct-words").textContent = "Change the SQL until it is right. The question is saved with it, to train on.";
  show("save", true);
}

at("wrong").addEventListener("click", () => {
  const opens = at("correcting").hidden;
  closeCorrecting();
  show("correcting", opens);
  at("wrong").setAttribute("aria-expanded", String(opens));
  if (opens) at("sql").focus();
});
at("save").addEventListener("click", save);

async function save() {
  const sql = at("sql").value.trim();
  if (!sql || !answered) return;
  const { question, evidence, database } = answered;
  const body = evidence ? { question, evidence, database, sql } : { question, database, sql };
  const kept = await work("Saving", (signal) => call("v1/corrections", body, signal), save);
  if (!kept) return;
  at("correct-words").textContent = "Saved. Thank you.";
  at("correct-words").setAttribute("role", "status");
  show("save", false);
}

// --- what was asked before, in this tab ---

function earlier() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(HISTORY));
    return Array.isArray(kept) ? kept : [];
  } catch {
    return [];
  }
}

function remember(reply) {
  const entry = { ...answered, rows: reply.row_count ?? null };
  const others = earlier().filter((one) => one.question !== entry.question || one.database !== entry.database);
  try {
    sessionStorage.setItem(HISTORY, JSON.stringify([entry, ...others].slice(0, MOST_HISTORY)));
  } catch {
    sessionStorage.removeItem(HISTORY);
  }
  showHistory();
}

function showHistory() {
  const entries = earlier().filter((one) => service.databases.includes(one.database));
  const lines = entries.map((entry) => {
    const button = make("button");
    button.type = "button";
    const rows = entry.rows === null ? "" : ` · ${entry.rows} ${entry.rows === 1 ? "row" : "rows"}`;
    button.append(make("span", "what", entry.question), make("span", "soft", `${entry.database}${rows}`));
    button.addEventListener("click", () => recall(entry));
    const line = make("li");
    line.append(button);
    return line;
  });
  at("earlier").replaceChildren(...lines);
  show("history", lines.length > 0);
}

async function recall(entry) {
  if (at("database").value !== entry.database) {
    at("database").value = entry.database;
    await choose();
  }
  if (!schema) return;
  const { question, evidence = "", database, sql } = entry;
  at("question").value = question;
  at("evidence").value = evidence;
  if (service.task !== "sql") return ask();
  clearAnswer();
  show("empty", false);
  answered = { question, evidence, database, sql };
  showAnswer({ timings: {} });
  scrollTo({ top: 0 });
  await run();
}

at("clear").addEventListener("click", () => {
  sessionStorage.removeItem(HISTORY);
  showHistory();
  at("question").focus();
});

// --- the network ---

const connection = () => show("offline", !navigator.onLine);
addEventListener("offline", connection);
addEventListener("online", connection);
connection();
if (/Mac|iPhone|iPad/.test(navigator.platform)) {
  for (const key of document.querySelectorAll("kbd")) key.textContent = "⌘ ↵";
}
begin();
