// What the page of `moellava routing` draws of its data; see `page_data` in routing_page.py.
const L = data.layers, parts = Object.keys(data.load).filter(p => data.tokens[p]);
let layer = 0;
const slider = document.getElementById('layer');
function pickLayer(k) { layer = k; slider.value = k; draw(); }
function multiples(rows) { return rows.map((row, k) => data.wide.map((_, e) => e < row.length ? row[e] * row.length : null)); }
const tables = Object.fromEntries(parts.map(p => [p, multiples(data.load[p])]));
const vmax = Math.max(2, ...Object.values(tables).flat(2).filter(v => v !== null));
function drawLoad() {
  const row = document.getElementById('load'); clear(row);
  for (const p of parts.filter(p => p !== 'all' || parts.length === 2)) {
    heat(add(row, 'div'), {rows: L, columns: data.wide, values: tables[p], vmax, width: parts.length > 2 ? 560 : 900,
      title: `${p} tokens (${data.tokens[p].toLocaleString()})`, across: 'expert', down: 'layer', marked: layer, pick: pickLayer, unit: ' × the even share',
      tip: (r, c) => tables[p][r][c] === null ? 'this layer has fewer experts' :
        `layer ${L[r]}, expert ${c}\n${number(100 * data.load[p][r][c])} % of the choices of ${p} tokens\n` +
        `${number(tables[p][r][c])} × the even share`});
  }
}
function drawTokens() {
  const experts = data.experts[layer];
  const seen = data.samples.flatMap(s => s.first[layer]);
  const colours = coloured(seen, experts), of = e => colours[e] || C.others;
  legendOf(document.getElementById('who'), colours, experts);
  const node = document.getElementById('samples'); clear(node);
  for (const sample of data.samples) {
    add(node, 'h3', {}, sample.name);
    const row = add(node, 'div', {class: 'row'});
    for (const picture of sample.pictures) drawPicture(add(row, 'div'), sample, picture, of);
    const text = add(add(row, 'div', {style: 'flex: 1; min-width: 320px'}), 'div', {class: 'text-of'});
    sample.texts.forEach((words, k) => {
      if (words === null) return;
      const token = add(text, 'span', {class: 'token', style: `background:${of(sample.first[layer][k])}66`}, words);
      tips(token, () => tokenTip(sample, k));
    });
  }
}
function tokenTip(sample, k) {
  const all = sample.all[layer][k].map((e, r) => `expert ${e}` + (r ? '' : ' (first)')).join(', ');
  const path = sample.first.map((row, l) => row[k]);
  return `layer ${L[layer]}: ${all}\nfirst choices through the layers: ${path.join(' → ')}`;
}
function drawPicture(node, sample, picture, of) {
  if (!picture.grids.length) {
    add(node, 'img', {src: picture.image, style: 'max-width: 300px'});
    add(node, 'p', {}, `Its ${picture.length} tokens are no grid of rows and columns, so they are shown in a row.`);
    const strip = add(node, 'div', {style: 'max-width: 300px; line-height: 10px'});
    for (let k = 0; k < picture.length; k++) {
      const e = sample.first[layer][picture.first + k];
      tips(add(strip, 'span', {style: `display:inline-block;width:9px;height:9px;background:${of(e)}`}),
           () => tokenTip(sample, picture.first + k));
    }
    return;
  }
  picture.grids.forEach(grid => {
    const box = grid.box || [0, 0, 1, 1], w = (box[2] - box[0]) * picture.width, h = (box[3] - box[1]) * picture.height;
    const scale = (picture.grids.length > 3 ? 150 : 300) / Math.max(w, h), W = w * scale, H = h * scale;
    const frame = add(node, 'div', {style: 'display:inline-block; margin: 0 10px 10px 0; vertical-align: top'});
    const svg = add(frame, 'svg', {width: W, height: H + 16, viewBox: `0 0 ${W} ${H + 16}`});
    if (grid.box) add(svg, 'image', {href: picture.image, x: -box[0] * picture.width * scale, y: -box[1] * picture.height * scale,
      width: picture.width * scale, height: picture.height * scale, preserveAspectRatio: 'none', style: 'filter: grayscale(1)'});
    for (let r = 0; r < grid.rows; r++) for (let c = 0; c < grid.columns; c++) {
      const k = picture.first + grid.first + r * grid.pitch + c;
      const cell = add(svg, 'rect', {x: c * W / grid.columns, y: r * H / grid.rows, width: W / grid.columns, height: H / grid.rows,
        fill: of(sample.first[layer][k]), 'fill-opacity': grid.box ? .6 : 1, class: 'patch'});
      tips(cell, () => `row ${r + 1}, column ${c + 1}\n` + tokenTip(sample, k));
    }
    add(svg, 'rect', {x: 0, y: H, width: W, height: 16, fill: '#fff'});
    add(svg, 'text', {x: 0, y: H + 12}, `${grid.name}: ${grid.rows} × ${grid.columns}`);
  });
  const plain = add(node, 'div');
  add(plain, 'img', {src: picture.image, style: 'max-width: 150px; max-height: 150px'});
}
function drawPaths() {
  const row = document.getElementById('paths'); clear(row);
  for (const p of ['image', 'text'].filter(p => data.tokens[p])) {
    const paths = data.pathways[p], together = paths.reduce((sum, path) => sum + path.share, 0);
    flow(add(row, 'div'), {layers: L, experts: data.wide.length, paths, title:
      `${p} tokens: the ${paths.length} most frequent of ${data.distinct[p].toLocaleString()} pathways, ` +
      `${number(100 * together)} % of them`});
  }
}
function drawLines() {
  const x = L.map((_, k) => k), base = {x, marks: x, names: L, across: 'layer', zero: true};
  lines(document.getElementById('information'), {...base, title: 'bits that the choice of an expert tells',
    series: data.factors.filter(f => f.bound > 0).map((f, k) => ({name: `${f.label} (at most ${number(f.bound)})`, y: f.bits,
      colour: C.palette[k]}))});
  lines(document.getElementById('entropy'), {...base, title: 'entropy of the router, in nats', series: [
    {name: 'image tokens', y: data.entropy.image, colour: C.image}, {name: 'text tokens', y: data.entropy.text, colour: C.text},
    {name: 'any expert alike', y: data.experts.map(Math.log), colour: '#777', dash: '4 3'}]});
  if (data.dropped.some(v => v > 0)) lines(document.getElementById('dropped'), {...base,
    title: 'choices dropped, %', series: [{name: 'dropped', y: data.dropped.map(v => 100 * v), colour: C.palette[5]}]});
}
function drawFactor() {
  const f = data.factors[document.getElementById('factor').value], experts = data.experts[layer];
  const rows = f.by_value[layer], top = Math.max(2, ...rows.flat().map(v => v * experts));
  heat(document.getElementById('by'), {rows: f.names, columns: rows[0].map((_, e) => e), vmax: top, width: 900, unit: ' × the even share',
    values: rows.map(row => row.map(v => v * experts)), across: 'expert', title: `layer ${L[layer]}, by ${f.label}`,
    tip: (r, c) => `${f.names[r]}, expert ${c}\n${number(100 * rows[r][c])} % of their choices\n` +
      `${number(rows[r][c] * experts)} × the even share`});
}
function draw() { document.getElementById('name').textContent = 'layer ' + L[layer]; drawLoad(); drawTokens(); drawFactor(); }
slider.max = L.length - 1; slider.value = 0;
slider.addEventListener('input', () => pickLayer(+slider.value));
data.factors.forEach((f, k) => add(document.getElementById('factor'), 'option', {value: k}, f.label));
document.getElementById('factor').addEventListener('change', drawFactor);
draw(); drawPaths(); drawLines();
