// Charts of our pages as SVG, and a tip at the mouse. No library, no network. `heat`, `lines` and `flow` draw into an
// element; what they take is said at each. Texts of users go through `textContent` alone.
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const C = data.colours, tip = document.getElementById('tip');

function el(tag, attributes = {}, text) {
  const svg = ['svg', 'rect', 'line', 'path', 'text', 'g', 'circle', 'image', 'polyline', 'title'].includes(tag);
  const node = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function add(parent, ...rest) { const node = el(...rest); parent.appendChild(node); return node; }
function clear(node) { while (node.firstChild) node.firstChild.remove(); }
function number(value) {
  if (value === null || value === undefined) return '–';
  const size = Math.abs(value);
  if (size && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return String(+value.toPrecision(4));
}
function showTip(event, text) {
  tip.textContent = text; tip.style.display = 'block';
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + 'px';
}
function tips(node, text) {
  node.addEventListener('mousemove', event => showTip(event, typeof text === 'function' ? text(event) : text));
  node.addEventListener('mouseleave', () => { tip.style.display = 'none'; });
}

// Cividis, at nine places from 0 to 1.
const CIVIDIS = [[0,32,77],[0,52,111],[57,72,107],[87,93,109],[112,113,115],[138,134,120],[166,157,117],[197,182,106],
                 [255,234,70]];
function shade(value) {
  if (value === null || value === undefined) return '#fff';
  const place = Math.max(0, Math.min(1, value)) * 8, low = Math.min(7, Math.floor(place)), part = place - low;
  return 'rgb(' + [0, 1, 2].map(k => Math.round(CIVIDIS[low][k] + part * (CIVIDIS[low + 1][k] - CIVIDIS[low][k]))) + ')';
}

// values[row][column]; rows, columns: labels; vmax, unit: of the scale; tip(row, column) -> text; pick(row): a click; marked: a row.
function heat(node, o) {
  clear(node);
  const left = 52, top = 18, n = o.columns.length, width = o.width || 520;
  const w = Math.min(46, (width - left - 6) / n), h = o.rows.length <= 16 ? 20 : Math.max(12, Math.min(20, w));
  const svg = add(node, 'svg', {width: left + n * w + 6, height: top + o.rows.length * h + 34,
                                viewBox: `0 0 ${left + n * w + 6} ${top + o.rows.length * h + 34}`});
  add(svg, 'text', {x: left, y: 12, 'font-weight': 600}, o.title || '');
  o.rows.forEach((name, r) => {
    if (r % Math.ceil(14 / Math.max(h, 1)) === 0)
      add(svg, 'text', {x: left - 6, y: top + (r + .5) * h + 4, 'text-anchor': 'end'}, name);
    o.columns.forEach((_, c) => {
      const value = o.values[r][c];
      const cell = add(svg, 'rect', {x: left + c * w, y: top + r * h, width: w + .3, height: h + .3,
                                     fill: shade(value === null ? null : value / o.vmax)});
      tips(cell, () => o.tip(r, c));
      if (o.pick) { cell.style.cursor = 'pointer'; cell.addEventListener('click', () => o.pick(r)); }
    });
  });
  if (o.marked !== undefined)
    add(svg, 'rect', {x: left, y: top + o.marked * h, width: n * w, height: h, fill: 'none', stroke: C.palette[5],
                      'stroke-width': 2});
  const step = Math.ceil(34 / w);
  o.columns.forEach((name, c) => { if (c % step === 0)
    add(svg, 'text', {x: left + (c + .5) * w, y: top + o.rows.length * h + 14, 'text-anchor': 'middle'}, name); });
  add(svg, 'text', {x: left + n * w / 2, y: top + o.rows.length * h + 30, 'text-anchor': 'middle'}, o.across || '');
  add(svg, 'text', {x: 2, y: top - 4}, o.down || '');
  const scale = add(node, 'div', {class: 'note scale'});
  add(scale, 'span', {}, '0 ');
  add(scale, 'i', {style: `background: linear-gradient(to right, ${CIVIDIS.map(c => `rgb(${c})`).join(',')})`});
  add(scale, 'span', {}, ` ${number(o.vmax)}${o.unit || ''}`);
}

function spaced(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(k => k * power).find(k => k >= raw), found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(+value.toPrecision(10));
  return found;
}

// x: numbers; series: [{name, y, colour, dash, points}], null where there is no number; title, across; zero: from 0 on.
function lines(node, o) {
  clear(node);
  const width = o.width || 540, height = o.height || 210, left = 58, right = 10, top = 20, bottom = 34;
  const values = o.series.flatMap(s => s.y).filter(v => v !== null && v !== undefined);
  if (!values.length) return;
  let low = o.zero ? 0 : Math.min(...values), high = Math.max(...values);
  if (high === low) { high += Math.abs(high) * .1 || 1; low -= o.zero ? 0 : Math.abs(low) * .1 || 1; }
  high += (high - low) * .05;
  const first = Math.min(...o.x), last = Math.max(...o.x);
  const X = v => left + (last === first ? .5 : (v - first) / (last - first)) * (width - left - right);
  const Y = v => top + (1 - (v - low) / (high - low)) * (height - top - bottom);
  const svg = add(node, 'svg', {width, height, viewBox: `0 0 ${width} ${height}`});
  add(svg, 'text', {x: left, y: 12, 'font-weight': 600}, o.title || '');
  for (const v of spaced(low, high, 5)) {
    add(svg, 'line', {x1: left, x2: width - right, y1: Y(v), y2: Y(v), stroke: '#eee'});
    add(svg, 'text', {x: left - 6, y: Y(v) + 4, 'text-anchor': 'end'}, number(v));
  }
  for (const v of o.marks || spaced(first, last, 6)) {
    if (o.marks && o.marks.length > 26 && o.marks.indexOf(v) % 2) continue;
    add(svg, 'text', {x: X(v), y: height - bottom + 14, 'text-anchor': 'middle'}, o.names ? o.names[v] : number(v));
  }
  add(svg, 'text', {x: (left + width - right) / 2, y: height - 4, 'text-anchor': 'middle'}, o.across || '');
  for (const s of o.series) {
    let path = '', pen = 'M';
    s.y.forEach((v, k) => { if (v === null || v === undefined) { if (!s.points) pen = 'M'; return; }
                            path += pen + X(o.x[k]).toFixed(1) + ' ' + Y(v).toFixed(1); pen = 'L'; });
    add(svg, 'path', {d: path, fill: 'none', stroke: s.colour, 'stroke-width': 1.8, 'stroke-dasharray': s.dash || ''});
    if (s.points || o.x.length < 40) s.y.forEach((v, k) => { if (v !== null && v !== undefined)
      add(svg, 'circle', {cx: X(o.x[k]), cy: Y(v), r: 2.6, fill: s.colour}); });
  }
  const cursor = add(svg, 'line', {y1: top, y2: height - bottom, stroke: '#999', visibility: 'hidden'});
  const area = add(svg, 'rect', {x: left, y: top, width: width - left - right, height: height - top - bottom,
                                 fill: 'transparent'});
  tips(area, event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) * width / box.width;
    let k = 0; o.x.forEach((v, n) => { if (Math.abs(X(v) - at) < Math.abs(X(o.x[k]) - at)) k = n; });
    cursor.setAttribute('x1', X(o.x[k])); cursor.setAttribute('x2', X(o.x[k])); cursor.setAttribute('visibility', 'visible');
    const shown = o.series.filter(s => s.y[k] !== null && s.y[k] !== undefined).map(s => s.name + ': ' + number(s.y[k]));
    return [(o.across || '') + ' ' + (o.names ? o.names[o.x[k]] : o.x[k]), ...shown].join('\n');
  });
  area.addEventListener('mouseleave', () => cursor.setAttribute('visibility', 'hidden'));
  if (o.series.length > 1) {
    const legend = add(node, 'div', {class: 'legend'});
    for (const s of o.series) {
      const entry = add(legend, 'span');
      add(entry, 'i', {style: 'background:' + s.colour}); entry.append(s.name + (s.dash ? ' (dashed)' : ''));
    }
  }
}

// layers: labels; experts: most of a layer; paths: [{experts, share}].
function flow(node, o) {
  clear(node);
  const left = 40, top = 20, width = Math.min(1120, Math.max(420, 90 + 52 * o.layers.length));
  const height = Math.min(460, Math.max(150, 50 + 34 * o.experts));
  const X = k => left + (k + .5) * (width - left - 8) / o.layers.length;
  const Y = (e, r) => top + (e + .5 + (r - (o.paths.length - 1) / 2) * .5 / o.paths.length) * (height - top - 36) / o.experts;
  const svg = add(node, 'svg', {width, height, viewBox: `0 0 ${width} ${height}`});
  add(svg, 'text', {x: left, y: 12, 'font-weight': 600}, o.title);
  const skip = Math.ceil(o.experts / 16), every = Math.ceil(o.layers.length / 30);
  for (let e = 0; e < o.experts; e += skip)
    add(svg, 'text', {x: left - 8, y: Y(e, (o.paths.length - 1) / 2) + 4, 'text-anchor': 'end'}, e);
  o.layers.forEach((name, k) => { if (k % every === 0)
    add(svg, 'text', {x: X(k), y: height - 20, 'text-anchor': 'middle'}, name); });
  add(svg, 'text', {x: width / 2, y: height - 4, 'text-anchor': 'middle'}, 'layer (across), expert (down)');
  const drawn = [];
  o.paths.forEach((path, r) => {
    const points = path.experts.map((e, k) => X(k) + ',' + Y(e, r)).join(' ');
    const line = add(svg, 'polyline', {points, fill: 'none', stroke: r < 3 ? C.palette[r] : '#999', 'stroke-linejoin': 'round',
                                       'stroke-width': r < 3 ? 2 + 3 * path.share / o.paths[0].share : 1.2});
    drawn.push(line);
    tips(line, `${r + 1}: ${number(100 * path.share)} % of the tokens\nexperts ${path.experts.join(' → ')}`);
    line.addEventListener('mouseenter', () => drawn.forEach(other => { other.style.opacity = other === line ? 1 : .15; }));
    line.addEventListener('mouseleave', () => drawn.forEach(other => { other.style.opacity = 1; }));
  });
}

// Experts that are chosen most -> colours, as in the PNG files.
function coloured(chosen, experts) {
  const colours = {};
  if (experts <= C.palette.length) { for (let e = 0; e < experts; e++) colours[e] = C.palette[e]; return colours; }
  const counts = {};
  for (const e of chosen) counts[e] = (counts[e] || 0) + 1;
  Object.keys(counts).sort((a, b) => counts[b] - counts[a] || a - b).slice(0, C.palette.length - 1)
    .forEach((e, k) => { colours[e] = C.palette[k]; });
  return colours;
}
function legendOf(node, colours, experts) {
  clear(node);
  for (const [expert, colour] of Object.entries(colours)) {
    const entry = add(node, 'span');
    add(entry, 'i', {style: 'background:' + colour}); entry.append('expert ' + expert);
  }
  if (experts > C.palette.length) {
    const entry = add(node, 'span');
    add(entry, 'i', {style: 'background:' + C.others}); entry.append('any other of ' + experts);
  }
}
