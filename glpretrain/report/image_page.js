// The page: builds itself from its data, and redraws what a prompt or a threshold changes.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const LOW = -1, HIGH = 1; // of the threshold's slider, the histogram and the common colour scale
  const DRAWN = 480; // pixels of the longer side of a picture as it is drawn, in its own proportions, whatever the encoder's size
  const { element, plural, card, packed, painted, enlarged, colour, greys, heat, cutOut, histogram, frame } = drawing(maps.bytes(data.colours));
  const state = {
    thresholds: data.backbones.map((backbone) => backbone.threshold),
    layers: data.backbones.map((backbone) => backbone.layers.length - 1), // positions among the stored blocks
    points: data.images.map(() => ({ y: 0.5, x: 0.5 })), // of the prompts, shares of height and width
    hovered: data.images.map(() => null),
    linked: data.backbones.every((backbone) => backbone.threshold === data.backbones[0].threshold), // one threshold for all of them
    shared: false,
  };
  const unit = data.unit || "pixels"; // that an item is made of: of a sound, cells of time and frequency
  const views = []; // [image][backbone]: what is stored, what was computed from it, and where it is drawn
  const stale = new Map(); // view to what has changed since it was drawn: "prompt", "threshold" or "pointer"
  let scheduled = false;

  const rangeOf = (view) => (state.shared ? [LOW, HIGH] : maps.range(view.cosines));
  const lineOf = (view) => view.drawn[1] / Math.max(1, view.canvases.image.clientWidth); // as wide as one pixel of the screen
  const thresholdOf = (view) => state.thresholds[view.b];

  // ---- what a prompt or a threshold changes

  // The pictures, and over each of them the prompt and the patch under the pointer.
  function compose(view) {
    const line = lineOf(view), { grid } = view.backbone, point = state.hovered[view.i], hovered = point && maps.patchAt(grid, point);
    for (const [name, canvas] of Object.entries(view.canvases)) {
      canvas.getContext("2d").drawImage(view.layers[name], 0, 0);
      if (hovered) frame(canvas, grid, hovered, [["rgba(0, 0, 0, 0.6)", 2 * line], ["rgba(255, 255, 255, 0.9)", line]]);
      frame(canvas, grid, view.prompt, [["#000", 3.4 * line], ["#fff", 1.6 * line]]);
    }
    view.pointer.textContent = hovered
      ? `pointer: row ${hovered.row}, column ${hovered.column} (patch ${hovered.index}), cosine ${view.cosines[hovered.index].toFixed(3)}`
      : "";
  }

  function describe(view) {
    const threshold = thresholdOf(view), { row, column, index } = view.prompt, [low, high] = maps.range(view.cosines);
    const above = maps.count(view.cosines, (cosine) => cosine > threshold), share = maps.count(view.mask, Boolean) / view.mask.length;
    view.readout.textContent = `prompt: row ${row}, column ${column} (patch ${index}) \u00b7 ${above} of ${view.cosines.length} patches `
      + `above ${threshold.toFixed(3)} \u00b7 ${(100 * share).toFixed(1)} % of the ${unit}`;
    view.extent.textContent = `cosines ${low.toFixed(2)} to ${high.toFixed(2)}`;
  }

  // Brings a view's numbers and pictures up to date.
  function update(view) {
    const change = stale.get(view), { backbone: { grid, size } } = view;
    stale.delete(view);
    if (change === "prompt") {
      view.prompt = maps.patchAt(grid, state.points[view.i]);
      view.cosines = maps.cosines(view.features, view.axes, view.prompt.index);
      view.map = maps.upsample(view.cosines, grid, size); // what an evaluator compares with the threshold
      view.shown = maps.upsample(view.cosines, grid, view.drawn); // the same at the pixels of the picture
      view.layers.similarity = heat(view.drawn, view.grey, view.shown, rangeOf(view), data.opacity);
    }
    if (change === "prompt" || change === "threshold") {
      const threshold = thresholdOf(view), look = { dimmed: data.dimmed, drawn: view.drawn, line: 1.3 * lineOf(view) };
      view.mask = Uint8Array.from(view.map, (similarity) => (similarity > threshold ? 1 : 0));
      view.layers.mask = cutOut(view.drawn, view.rgba, view.grey, view.shown.map((similarity) => Number(similarity > threshold)), look);
      histogram(view.histogram, view.cosines, { low: LOW, high: HIGH, range: rangeOf(view), threshold });
      describe(view);
    }
    if (change) compose(view);
  }

  // What is on the screen is updated in the next frame, the rest when it comes into sight or is read.
  function updateSeen() {
    scheduled = false;
    for (const view of [...stale.keys()]) if (view.seen) update(view);
  }

  function schedule() {
    if (!scheduled) requestAnimationFrame(updateSeen);
    scheduled = true;
  }

  function changed(some, change) {
    const order = ["pointer", "threshold", "prompt"]; // each includes those before
    for (const view of some) if (order.indexOf(change) > order.indexOf(stale.get(view))) stale.set(view, change);
    schedule();
  }

  function prompt(i, point) {
    state.points[i] = point;
    changed(views[i], "prompt");
  }

  function setThreshold(b, value) {
    state.thresholds = state.thresholds.map((own, other) => (state.linked || other === b ? value : own));
    for (const view of views.flat()) view.slider.value = view.typed.value = thresholdOf(view);
    changed(views.flat(), "threshold");
  }

  // ---- building the page

  function pointOf(event) {
    const box = event.currentTarget.getBoundingClientRect(), inside = (share) => Math.min(1 - 1e-9, Math.max(0, share));
    return { y: inside((event.clientY - box.top) / box.height), x: inside((event.clientX - box.left) / box.width) };
  }

  function centred(view, point) {
    const { row, column } = maps.patchAt(view.backbone.grid, point), [rows, columns] = view.backbone.grid;
    return { y: (row + 0.5) / rows, x: (column + 0.5) / columns };
  }

  function listen(view, canvas) {
    const { i } = view;
    canvas.addEventListener("click", (event) => prompt(i, centred(view, pointOf(event))));
    canvas.addEventListener("pointermove", (event) => {
      state.hovered[i] = pointOf(event);
      if (event.pointerType === "mouse" && event.buttons === 1) prompt(i, centred(view, state.hovered[i]));
      changed(views[i], "pointer");
    });
    canvas.addEventListener("pointerleave", () => {
      state.hovered[i] = null;
      changed(views[i], "pointer");
    });
  }

  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  function step(view, event) {
    if (!(event.key in STEPS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const { row, column } = maps.patchAt(view.backbone.grid, state.points[view.i]), [rows, columns] = view.backbone.grid;
    const [down, right] = STEPS[event.key], within = (place, count) => Math.min(count - 1, Math.max(0, place));
    prompt(view.i, { y: (within(row + down, rows) + 0.5) / rows, x: (within(column + right, columns) + 0.5) / columns });
  }

  function saveMask(view) {
    update(view);
    painted(view.backbone.size, (n) => (view.mask[n] ? packed(255, 255, 255) : packed(0, 0, 0))).toBlob((blob) => {
      const href = URL.createObjectURL(blob), stem = data.images[view.i].name.replace(/\.[^.]*$/, "");
      element("a", { href, download: `${stem}-${view.backbone.name.replace(/[^\w.-]+/g, "_")}-mask.png` }).click();
      setTimeout(() => URL.revokeObjectURL(href), 1000);
    });
  }

  function pictureFigure(view, name, caption, extra = []) {
    const [height, width] = view.drawn;
    const canvas = element("canvas", { width, height, attributes: { role: "img", "aria-label": `${caption}, ${view.title}` } });
    view.canvases[name] = canvas;
    listen(view, canvas);
    return element("figure", {}, canvas, element("figcaption", {}, element("span", { textContent: caption }), ...extra));
  }

  function thresholdControl(view) {
    const id = `threshold-${view.i}-${view.b}`, { b } = view;
    const named = (name) => ({ "aria-label": `${name}, ${view.title}` });
    view.histogram = element("canvas", { width: 960, height: 112, attributes: { role: "img", ...named("Histogram of cosines") } });
    view.slider = element("input", { type: "range", id, min: LOW, max: HIGH, step: 0.005, value: thresholdOf(view) });
    view.typed = element("input", {
      type: "number", min: LOW, max: HIGH, step: 0.001, value: thresholdOf(view), attributes: named("Threshold as a number"),
    });
    view.extent = element("span", { className: "range" });
    view.slider.addEventListener("input", () => setThreshold(b, Number(view.slider.value)));
    view.typed.addEventListener("change", () => {
      const value = view.typed.value === "" ? thresholdOf(view) : Number(view.typed.value);
      setThreshold(b, Math.min(HIGH, Math.max(LOW, value)));
    });
    const label = element("label", { textContent: "Threshold", htmlFor: id });
    const row = element("div", { className: "row" }, label, view.extent, view.typed);
    return element("div", { className: "threshold" }, view.histogram, view.slider, row);
  }

  function attentionBlock(view) {
    const { backbone, b } = view, own = data.views[view.i][b];
    if (own.attention === null) return element("p", { className: "note", textContent: `No attention maps: ${own.reason}.` });
    const shades = maps.bytes(own.attention), grid = element("div", { className: "heads" }), size = view.count;
    const select = element("select", { attributes: { "aria-label": `Block whose attention is shown, ${view.title}` } });
    backbone.layers.forEach((layer, position) => {
      const last = layer === backbone.depth - 1 ? " (last)" : "";
      select.append(element("option", { value: position, textContent: `block ${layer}${last}` }));
    });
    select.addEventListener("change", () => {
      state.layers[b] = Number(select.value);
      for (const image of views) image[b].drawAttention();
    });
    view.drawAttention = () => {
      const first = state.layers[b] * own.heads, mean = new Float64Array(size);
      select.value = state.layers[b];
      const headFigures = Array.from({ length: own.heads }, (_, head) => {
        const map = shades.subarray((first + head) * size, (first + head + 1) * size), peak = own.peaks[first + head];
        map.forEach((shade, patch) => { mean[patch] += (shade / 255) * (peak / own.heads); });
        return headFigure(view, `head ${head}`, (patch) => colour(map[patch], [0, 255]), peak);
      });
      const [, peak] = maps.range(mean);
      grid.replaceChildren(...headFigures, headFigure(view, "mean", (patch) => colour(mean[patch], [0, peak]), peak));
    };
    return element("div", { className: "attention" }, element("div", { className: "row" }, "Attention of the class token", select), grid);
  }

  function headFigure(view, name, colourOf, peak) {
    const canvas = painted(view.backbone.grid, colourOf);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Attention, ${name}, ${view.title}`);
    canvas.style.aspectRatio = `${view.drawn[1]} / ${view.drawn[0]}`;
    const largest = element("span", { textContent: `${(100 * peak).toPrecision(2)} %`, title: "attention of the brightest patch" });
    return element("figure", {}, canvas, element("figcaption", {}, element("span", { textContent: name }), largest));
  }

  function article(view) {
    const title = `Save the mask as PNG, ${view.title}`;
    const save = element("button", { type: "button", textContent: "save PNG", attributes: { "aria-label": title } });
    save.addEventListener("click", () => saveMask(view));
    const pictures = element("div", { className: "pictures" },
      pictureFigure(view, "image", "As the encoder sees it"), pictureFigure(view, "similarity", "Similarity to the prompt"),
      pictureFigure(view, "mask", "Mask", [save]), pictureFigure(view, "pca", "PCA of patches"));
    const focused = view.canvases.similarity;
    focused.tabIndex = 0;
    focused.setAttribute("role", "application");
    focused.setAttribute("aria-label", `Similarity to the prompt, ${view.title}. Arrow keys move the prompt.`);
    focused.addEventListener("keydown", (event) => step(view, event));
    view.readout = element("p", { className: "readout", attributes: { "aria-live": "polite" } });
    view.pointer = element("p", { className: "pointer" });
    const made = element("article", { className: "backbone" }, element("h3", { textContent: view.backbone.name }),
      pictures, view.readout, view.pointer, thresholdControl(view), attentionBlock(view));
    const watch = ([entry]) => { view.seen = entry.isIntersecting; schedule(); };
    new IntersectionObserver((entries) => watch(entries.slice(-1)), { rootMargin: "300px" }).observe(made);
    return made;
  }

  async function decoded(address) {
    const picture = new Image();
    picture.src = address;
    await picture.decode();
    return picture;
  }

  async function viewOf(i, b) {
    const backbone = data.backbones[b], stored = data.views[i][b];
    const count = backbone.grid[0] * backbone.grid[1], pca = maps.bytes(stored.pca), [rows, columns] = data.images[i].size;
    const drawn = [rows, columns].map((side) => Math.max(1, Math.round((DRAWN * side) / Math.max(rows, columns))));
    const [seen, picture] = await Promise.all([data.images[i].pictures[backbone.picture], data.images[i].shown].map(decoded));
    const pixels = element("canvas", { width: drawn[1], height: drawn[0] }), context = pixels.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0, drawn[1], drawn[0]);
    const view = { i, b, backbone, count, drawn, canvases: {}, layers: {}, axes: stored.axes };
    view.title = `${data.images[i].name}, ${backbone.name}`;
    view.features = maps.features(stored.features);
    view.rgba = context.getImageData(0, 0, drawn[1], drawn[0]).data;
    view.grey = greys(view.rgba);
    view.layers.image = enlarged(seen, drawn);
    view.layers.pca = enlarged(painted(backbone.grid, (n) => packed(pca[3 * n], pca[3 * n + 1], pca[3 * n + 2])), drawn);
    return view;
  }

  const across = ([height, width]) => `${width} \u00d7 ${height}`;

  const cardOf = (backbone) => card(backbone, {
    patches: `${across(backbone.patch)} ${unit}`,
    shown: `${across(backbone.size)} ${unit}, ${backbone.grid[0]} rows of ${backbone.grid[1]} patches`,
    trained: `${across(backbone.trained)} ${unit}`,
  });

  async function build() {
    const byId = (id) => document.getElementById(id);
    byId("lead").textContent = `${plural(data.images.length, data.noun || "picture")}, ${plural(data.backbones.length, "backbone")}. `
      + "Click a patch: what resembles it lights up, and the mask is what exceeds the threshold.";
    byId("version").textContent = `made by glpretrain ${data.version}`;
    byId("exactness").textContent = "Patches are stored as 16-bit integers on their principal axes. Largest error of any cosine: "
      + data.backbones.map((backbone) => `${backbone.error.toExponential(1)} (${backbone.name})`).join(", ") + ".";
    byId("cards").append(...data.backbones.map(cardOf));
    byId("link-option").hidden = data.backbones.length < 2;
    byId("linked").checked = state.linked;
    byId("linked").addEventListener("change", (event) => { state.linked = event.target.checked; });
    byId("shared").addEventListener("change", (event) => {
      state.shared = event.target.checked;
      changed(views.flat(), "prompt");
    });
    for (const [i, image] of data.images.entries()) {
      views.push(await Promise.all(data.backbones.map((_, b) => viewOf(i, b))));
      const heading = element("h2", { textContent: image.name }, element("small", { textContent: image.extent || `${across(image.size)} ${unit}` }));
      if (image.sound) heading.append(" ", element("audio", { src: image.sound, controls: true, attributes: { "aria-label": image.name } }));
      const columns = element("div", { className: "columns" }, ...views[i].map(article));
      byId("main").append(element("section", { className: "image" }, heading, columns));
      for (const view of views[i]) if (view.drawAttention) view.drawAttention();
      changed(views[i], "prompt");
    }
    window.addEventListener("beforeprint", () => views.flat().forEach(update));
  }

  // For whoever reads the page by program: copies of what is shown.
  const read = (i, b, answer) => { update(views[i][b]); return answer(views[i][b]); };
  window.glpretrainReport = Object.freeze({
    ready: build(),
    mask: (i, b) => read(i, b, (view) => ({ height: view.backbone.size[0], width: view.backbone.size[1], pixels: [...view.mask] })),
    similarity: (i, b) => read(i, b, (view) => [...view.map]),
    prompt: (i, b) => read(i, b, (view) => ({ ...view.prompt })),
    threshold: (i, b) => read(i, b, thresholdOf),
  });
})();
