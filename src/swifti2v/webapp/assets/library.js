// Queue and history: one line a job. Called by Gradio with `element`, `trigger`, `props` and `watch`.
const root = element.querySelector(".library-root");
const lines = new Map();

const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const put = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
};

const heading = make("h2", "", "Queue and history");
const empty = make("p", "hint", "Nothing here yet.");
const list = make("ul", "jobs");
root.replaceChildren(heading, empty, list);

function newLine(job) {
  const item = make("li", "job");
  const open = make("button", "open");
  open.type = "button";
  const picture = make("img");
  picture.alt = "";
  const words = make("span", "words");
  const title = make("span", "title");
  const state = make("span", "state");
  const bar = make("span", "bar");
  const filled = make("span", "filled");
  bar.append(filled);
  words.append(title, state, bar);
  open.append(picture, words);
  const end = make("button", "end");
  end.type = "button";
  open.addEventListener("click", () => trigger("click", { action: "open", id: job.id }));
  end.addEventListener("click", () => trigger("click", { action: end.dataset.action, id: job.id }));
  item.append(open, end);
  return { item, open, picture, title, state, bar, filled, end };
}

function fill(line, job) {
  if (line.picture.getAttribute("src") !== job.picture) line.picture.src = job.picture;
  put(line.title, job.title);
  put(line.state, job.headline);
  line.item.dataset.state = job.state;
  line.item.dataset.job = job.id;
  line.open.setAttribute("aria-current", job.current ? "true" : "false");
  line.bar.hidden = job.state !== "in_progress";
  line.filled.style.width = `${job.percent}%`;
  line.end.dataset.action = job.active ? "cancel" : "remove";
  put(line.end, job.active ? "Cancel" : "Remove");
  line.end.setAttribute("aria-label", `${job.active ? "Cancel" : "Remove"}: ${job.title}`);
}

function draw() {
  const jobs = Array.isArray(props.value) ? props.value : [];
  empty.hidden = jobs.length > 0;
  const known = new Set(jobs.map((job) => job.id));
  for (const [id, line] of lines) {
    if (known.has(id)) continue;
    line.item.remove();
    lines.delete(id);
  }
  jobs.forEach((job, place) => {
    if (!lines.has(job.id)) lines.set(job.id, newLine(job));
    const line = lines.get(job.id);
    fill(line, job);
    // Only what stands elsewhere is moved: moving a button takes the focus from it.
    if (list.children[place] !== line.item) list.insertBefore(line.item, list.children[place] || null);
  });
}

watch("value", draw);
draw();
