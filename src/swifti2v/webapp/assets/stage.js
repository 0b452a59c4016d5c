// The stage: one job, how far it is, what there is to see of it, and the comparison with its loupe.
// Called by Gradio with `element`, `trigger`, `props` and `watch`.
const root = element.querySelector(".stage-root");
const NAMES = { video: "Result", motion: "Stage I", input: "Input", compare: "Compare" };

const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const put = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
};
const button = (className, text, action) => {
  const node = make("button", className, text);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
};

let job = null;
let chosen = null; // the tab that the user chose for this job
let isUsed = false; // until a click, the page stays at its top
let zoom = 4;
let loupe = { x: 0.5, y: 0.5 }; // what it enlarges, in shares of the frame

// ---- the parts, made once -----------------------------------------------------------------------------------------
const welcome = make("div", "welcome");
welcome.append(make("h2", "", "See the motion before you pay for the pixels"));
const steps = make("ol");
for (const text of [
  "Drop a picture and say what should move.",
  "Preview the motion: Stage I only, small and quick.",
  "Like it? Make the full video from that very motion, and watch it grow segment by segment.",
]) steps.append(make("li", "", text));
welcome.append(steps);

const card = make("div", "card");
const head = make("div", "head");
const headline = make("h2");
headline.setAttribute("aria-live", "polite");
const chip = make("span", "chip");
head.append(headline, chip);
const prompt = make("p", "prompt");
const settings = make("p", "settings");
const progress = make("div", "progress");
progress.setAttribute("role", "progressbar");
progress.setAttribute("aria-valuemin", "0");
progress.setAttribute("aria-valuemax", "100");
const failure = make("p", "alert");
failure.setAttribute("role", "alert");
const tabs = make("div", "tabs");
tabs.setAttribute("role", "tablist");
tabs.setAttribute("aria-label", "What to look at");
const view = make("div", "view");
const actions = make("div", "actions");
const notes = make("ul", "notes");
card.append(head, progress, failure, tabs, view, actions, prompt, settings, notes);
root.replaceChildren(welcome, card);

// ---- panes: one picture or video each -----------------------------------------------------------------------------
function newPane(kind) {
  const node = make("figure", "pane");
  node.dataset.kind = kind;
  const frame = make("div", "frame");
  const media = make(kind === "input" ? "img" : "video");
  if (kind === "input") media.alt = "The input picture";
  else {
    Object.assign(media, { muted: true, loop: true, playsInline: true, preload: "auto" });
    media.setAttribute("aria-label", NAMES[kind]);
    media.addEventListener("loadedmetadata", () => {
      if (media.dataset.keep) media.currentTime = Math.min(Number(media.dataset.keep), media.duration || 0);
      if (playing) media.play().catch(() => {});
    });
  }
  const mark = make("span", "mark");
  frame.append(media, mark);
  const glass = make("canvas", "glass");
  const caption = make("figcaption", "", NAMES[kind]);
  node.append(caption, frame, glass);
  for (const name of ["pointermove", "pointerdown"]) frame.addEventListener(name, (event) => {
    if (current() !== "compare") return;
    const box = frame.getBoundingClientRect();
    moveLoupe((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  });
  return { kind, node, frame, media, mark, glass, caption };
}

const panes = { input: newPane("input"), motion: newPane("motion"), video: newPane("video") };
const compare = make("div", "panes");
compare.append(panes.input.node, panes.motion.node, panes.video.node);

function source(pane, address) {
  if (pane.media.getAttribute("src") === address) return;
  if (!address) {
    pane.media.removeAttribute("src");
    if (pane.kind !== "input") pane.media.load();
    return;
  }
  if (pane.kind !== "input") pane.media.dataset.keep = pane.media.dataset.job === job.id ? pane.media.currentTime : 0;
  pane.media.dataset.job = job.id;
  pane.media.src = address;
}

// ---- playing: one clock for all videos ----------------------------------------------------------------------------
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
const controls = make("div", "controls");
const play = button("play", "Pause", () => setPlaying(!playing));
const slider = make("input", "time");
slider.type = "range";
slider.setAttribute("aria-label", "Frame");
const count = make("output", "count");
const zoomLabel = make("label", "zoom", "Loupe ");
const zoomChoice = make("select");
for (const times of [2, 4, 8]) {
  const option = make("option", "", `${times}x`);
  option.value = times;
  zoomChoice.append(option);
}
zoomChoice.value = zoom;
zoomChoice.addEventListener("change", () => { zoom = Number(zoomChoice.value); drawLoupe(); });
zoomLabel.append(zoomChoice);
controls.append(play, slider, count, zoomLabel);
view.append(compare, controls);

const visibleVideos = () => [panes.video, panes.motion].filter((pane) => !pane.node.hidden && pane.media.src)
  .map((pane) => pane.media);

function setPlaying(wanted) {
  playing = wanted;
  put(play, playing ? "Pause" : "Play");
  for (const video of visibleVideos()) {
    if (playing) video.play().catch(() => {});
    else video.pause();
  }
}

slider.addEventListener("input", () => {
  setPlaying(false);
  // The middle of a frame: its edge may show the one before.
  for (const video of visibleVideos()) video.currentTime = (Number(slider.value) + 0.5) / job.fps;
});

function tick() {
  const [lead, ...others] = job ? visibleVideos() : [];
  if (lead && Number.isFinite(lead.duration)) {
    const last = Math.max(0, Math.round(lead.duration * job.fps) - 1);
    const frame = Math.min(last, Math.floor(lead.currentTime * job.fps + 0.01));
    if (Number(slider.max) !== last) slider.max = last;
    if (document.activeElement !== slider || playing) slider.value = frame;
    put(count, `${frame + 1} / ${last + 1}`);
    for (const other of others) {
      if (playing && Math.abs(other.currentTime - lead.currentTime) > 1.5 / job.fps) other.currentTime = lead.currentTime;
    }
  }
  drawLoupe();
  if (root.isConnected) requestAnimationFrame(tick);
}

// ---- the loupe: the same place of every pane, enlarged ------------------------------------------------------------
function moveLoupe(x, y) {
  loupe = { x: Math.min(1, Math.max(0, x)), y: Math.min(1, Math.max(0, y)) };
  drawLoupe();
}

// What of a pane's own picture the loupe shows, and where that is in the frame, in shares.
function place({ kind, media, frame }) {
  const [width, height] = [media.videoWidth || media.naturalWidth || 0, media.videoHeight || media.naturalHeight || 0];
  const box = frame.getBoundingClientRect();
  if (!width || !box.width) return null;
  const share = 1 / zoom;
  const left = Math.min(1 - share, Math.max(0, loupe.x - share / 2));
  const top = Math.min(1 - share, Math.max(0, loupe.y - share / 2));
  // The input covers the frame, centered, as `fit_image` cuts it; the motion is stretched to it, as the pipeline does.
  const scale = Math.max(box.width / width, box.height / height);
  const [across, down] = kind === "input" ? [box.width / scale, box.height / scale] : [width, height];
  const part = [(width - across) / 2 + left * across, (height - down) / 2 + top * down, across * share, down * share];
  return { part, left, top, share, box };
}

function drawLoupe() {
  if (current() !== "compare") return;
  for (const pane of Object.values(panes)) {
    const at = pane.node.hidden ? null : place(pane);
    if (!at) continue;
    const { glass, mark, media } = pane;
    const width = Math.round(at.box.width * devicePixelRatio);
    const height = Math.round(at.box.height * devicePixelRatio);
    if (glass.width !== width || glass.height !== height) Object.assign(glass, { width, height });
    const pencil = glass.getContext("2d");
    pencil.imageSmoothingQuality = "high";
    pencil.drawImage(media, ...at.part, 0, 0, width, height);
    mark.style.cssText = `left:${at.left * 100}%;top:${at.top * 100}%;width:${at.share * 100}%;height:${at.share * 100}%`;
  }
}

compare.addEventListener("keydown", (event) => {
  if (current() !== "compare") return;
  const at = loupe;
  const by = event.shiftKey ? 0.1 : 0.02;
  const moves = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] };
  if (moves[event.key]) moveLoupe(at.x + moves[event.key][0], at.y + moves[event.key][1]);
  else if (event.key === "Escape") moveLoupe(0.5, 0.5);
  else if (event.key === " ") setPlaying(!playing);
  else if (event.key === "+" || event.key === "-") {
    zoom = Math.min(8, Math.max(2, event.key === "+" ? zoom * 2 : zoom / 2));
    zoomChoice.value = zoom;
    moveLoupe(at.x, at.y);
  } else return;
  event.preventDefault();
});

// ---- tabs ---------------------------------------------------------------------------------------------------------
const tabButtons = {};
for (const kind of ["video", "motion", "input", "compare"]) {
  tabButtons[kind] = button("tab", NAMES[kind], () => { chosen = kind; draw(); });
  tabButtons[kind].setAttribute("role", "tab");
  tabs.append(tabButtons[kind]);
}
tabs.addEventListener("keydown", (event) => {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const there = Object.values(tabButtons).filter((tab) => !tab.hidden);
  const next = there[(there.indexOf(document.activeElement) + (event.key === "ArrowRight" ? 1 : -1) + there.length) % there.length];
  next.click();
  next.focus();
});

function available() {
  const media = job.media;
  const kinds = [];
  if (media.video || media.growing) kinds.push("video");
  if (media.motion) kinds.push("motion");
  if (media.input) kinds.push("input");
  if (kinds.length > 1) kinds.push("compare");
  return kinds;
}

function current() {
  if (!job) return null;
  const kinds = available();
  return kinds.includes(chosen) ? chosen : kinds[0];
}

// ---- drawing ------------------------------------------------------------------------------------------------------
function drawView() {
  const kinds = available();
  const shown = current();
  for (const [kind, tab] of Object.entries(tabButtons)) {
    tab.hidden = !kinds.includes(kind);
    tab.setAttribute("aria-selected", String(kind === shown));
    tab.tabIndex = kind === shown ? 0 : -1;
  }
  source(panes.input, job.media.input);
  source(panes.motion, job.media.motion);
  source(panes.video, job.media.video || job.media.growing);
  put(panes.video.caption, job.media.video ? "Result" : "Result, growing");
  for (const [kind, pane] of Object.entries(panes)) pane.node.hidden = !(shown === "compare" ? kinds.includes(kind) : kind === shown);
  compare.classList.toggle("side-by-side", shown === "compare");
  compare.style.setProperty("--aspect", job.aspect || "auto");
  compare.tabIndex = shown === "compare" ? 0 : -1;
  compare.setAttribute("role", "group");
  compare.setAttribute("aria-label", shown === "compare"
    ? "Comparison: arrow keys move the loupe, plus and minus change it, Escape centers it, space plays" : NAMES[shown] || "");
  controls.hidden = visibleVideos().length === 0;
  zoomLabel.hidden = shown !== "compare";
  view.hidden = kinds.length === 0;
  if (playing) setPlaying(true);
}

function drawProgress() {
  const active = job.state === "in_progress" || job.state === "queued";
  progress.hidden = !active;
  progress.setAttribute("aria-valuenow", job.percent);
  progress.setAttribute("aria-valuetext", job.headline);
  const wanted = job.kind === "preview" ? 1 : Math.max(job.segments, 1) + 1;
  while (progress.children.length > wanted) progress.lastChild.remove();
  while (progress.children.length < wanted) progress.append(make("span", "part"));
  [...progress.children].forEach((part, place) => {
    const done = job.kind === "preview" ? job.percent > 98 : place === 0 ? job.segments > 0 : place < job.segment;
    const working = job.state === "in_progress" && !done && (place === 0 ? job.segments === 0 : place === job.segment);
    part.className = `part${done ? " done" : ""}${working ? " working" : ""}`;
  });
}

function drawActions() {
  const wanted = [];
  if (job.state === "queued" || job.state === "in_progress") wanted.push(["cancel", "Cancel", "stop"]);
  if (job.kind === "preview" && job.state === "completed") {
    wanted.push(["go_on", "Make the full video", "main"], ["another", "Try another motion", ""]);
  }
  if (job.media.video) wanted.push(["download", "Download", "main"]);
  wanted.push(["reuse", "Reuse settings", ""]);
  const known = JSON.stringify([job.id, wanted]);
  if (actions.dataset.known === known) return; // so that a button keeps the focus
  actions.dataset.known = known;
  actions.replaceChildren(...wanted.map(([action, text, style]) => {
    if (action === "download") {
      const link = make("a", `action ${style}`, text);
      link.href = `${job.media.video}?download`;
      link.download = job.download;
      return link;
    }
    const node = button(`action ${style}`, text, () => trigger("click", { action, id: node.dataset.id }));
    node.dataset.id = job.id;
    node.dataset.action = action;
    return node;
  }));
}

function draw() {
  const next = props.value && props.value.id ? props.value : null;
  const isAnother = Boolean(next) && (!job || next.id !== job.id);
  if (isAnother) chosen = null;
  job = next;
  welcome.hidden = Boolean(job);
  card.hidden = !job;
  if (!job) return;
  card.dataset.state = job.state;
  card.dataset.job = job.id;
  card.dataset.kind = job.kind;
  put(headline, job.headline);
  const words = { queued: "Queued", in_progress: `${job.percent}%`, completed: "Done", failed: "Failed", cancelled: "Cancelled" };
  put(chip, words[job.state] + (job.seconds !== null && job.state !== "queued" ? `, ${job.seconds.toFixed(0)} s` : ""));
  put(prompt, job.prompt);
  put(settings, job.settings);
  failure.hidden = !job.error;
  put(failure, job.error);
  notes.replaceChildren(...job.notes.map((text) => make("li", "", text)));
  drawProgress();
  drawView();
  drawActions();
  if (isAnother && isUsed) root.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

element.closest(".gradio-container")?.addEventListener("click", () => { isUsed = true; }, { capture: true });
watch("value", draw);
draw();
requestAnimationFrame(tick);
