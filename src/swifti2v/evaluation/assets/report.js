// Plays all videos of the page together. Without this script each has the browser's own controls.
"use strict";
(() => {
  const root = document.querySelector("[data-players]");
  const videos = root ? [...root.querySelectorAll("video")] : [];
  if (!videos.length) return;
  const fps = Number(root.dataset.fps) || 24;
  const controls = root.querySelector(".controls");
  const [play, back, forward] = controls.querySelectorAll("button");
  const slider = controls.querySelector("input");
  const place = controls.querySelector("output");
  const speed = controls.querySelector("select");
  const farthestApart = 0.5 / fps;
  let leader = videos[0];
  let playing = false;

  const length = (video) => (Number.isFinite(video.duration) ? video.duration : 0);
  const lastFrame = () => Math.max(0, Math.round(length(leader) * fps) - 1);
  const frameNow = () => Math.min(lastFrame(), Math.floor(leader.currentTime * fps + 0.01));

  function show() {
    const frame = frameNow();
    slider.max = lastFrame();
    slider.value = frame;
    const text = `frame ${frame} of ${lastFrame()}, ${(frame / fps).toFixed(2)} s`;
    place.textContent = text;
    slider.setAttribute("aria-valuetext", text);
    play.textContent = playing ? "Pause" : "Play";
  }

  // The middle of a frame: at its border browsers round to either side.
  function seek(frame) {
    const time = (Math.min(Math.max(frame, 0), lastFrame()) + 0.5) / fps;
    for (const video of videos) video.currentTime = Math.min(time, Math.max(0, length(video) - farthestApart));
    show();
  }

  function pause() {
    playing = false;
    for (const video of videos) video.pause();
    show();
  }

  async function start() {
    if (frameNow() >= lastFrame()) seek(0);
    playing = true;
    for (const video of videos) video.playbackRate = Number(speed.value);
    await Promise.allSettled(videos.map((video) => video.play()));
    show();
    requestAnimationFrame(follow);
  }

  function follow() {
    if (!playing) return;
    for (const video of videos) {
      const apart = Math.abs(video.currentTime - leader.currentTime);
      // Twice a frame: correcting less would make the followers stutter.
      if (video !== leader && !video.ended && !video.seeking && apart > 4 * farthestApart) {
        video.currentTime = Math.min(leader.currentTime, length(video));
      }
    }
    show();
    if (leader.ended) pause();
    else requestAnimationFrame(follow);
  }

  for (const video of videos) {
    const duration = video.closest("figure").querySelector(".duration");
    video.controls = false;
    const known = () => {
      duration.textContent = `${video.duration.toFixed(2)} s`;
      if (length(video) > length(leader)) leader = video;
      show();
    };
    const failed = () => {
      duration.textContent = "this browser cannot play the file";
    };
    video.addEventListener("loadedmetadata", known);
    video.addEventListener("error", failed);
    video.addEventListener("seeked", () => playing || show());
    if (video.readyState >= HTMLMediaElement.HAVE_METADATA) known();
    if (video.error) failed();
  }
  play.addEventListener("click", () => (playing ? pause() : start()));
  const step = (by) => {
    pause();
    seek(frameNow() + by);
  };
  back.addEventListener("click", () => step(-1));
  forward.addEventListener("click", () => step(1));
  slider.addEventListener("input", () => {
    const frame = Number(slider.value);
    pause();
    seek(frame);
  });
  speed.addEventListener("change", () => {
    for (const video of videos) video.playbackRate = Number(speed.value);
  });
  controls.hidden = false;
  show();
})();
