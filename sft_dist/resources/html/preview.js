"use strict";
const rows = JSON.parse(document.getElementById("data").textContent);
const search = document.getElementById("search"), order = document.getElementById("order");
const place = document.getElementById("rows"), more = document.getElementById("more"), count = document.getElementById("count");
const KINDS = { t: "trained", m: "masked", b: "boundary", B: "boundary trained", c: "cut", u: "unknown" };
const RANKS = {
  worst: (row) => -row.badness, cut: (row) => -row.cut, share: (row) => row.share, length: (row) => -row.length,
  unknown: (row) => -row.unknown, number: (row) => row.number,
};
const PAGE = 50;
let found = [], drawn = 0;
for (const row of rows) row.text = (row.where + "\n" + row.tokens.map((token) => token[1]).join("")).toLowerCase();

function card(row) {
  const article = document.createElement("article"), header = document.createElement("header"), body = document.createElement("pre");
  header.textContent = `${row.where} · ${row.length} tokens, ${row.trained} trained (${(100 * row.share).toFixed(1)} %)` +
    (row.cut ? `, ${row.cut} beyond max_length` : "") + (row.unknown ? `, ${row.unknown} unknown` : "");
  for (const [kind, text] of row.tokens) {
    const span = document.createElement("span");
    span.className = KINDS[kind];
    span.textContent = text;
    body.append(span);
  }
  article.append(header, body);
  return article;
}

function draw() {
  place.append(...found.slice(drawn, drawn + PAGE).map(card));
  drawn = Math.min(found.length, drawn + PAGE);
  more.hidden = drawn === found.length;
  count.textContent = `${found.length} of ${rows.length} rows, ${drawn} shown`;
}

function begin() {
  const words = search.value.toLowerCase().replaceAll(" ", "\u00b7"), plain = search.value.toLowerCase();
  found = rows.filter((row) => row.text.includes(words) || row.text.includes(plain));
  const rank = RANKS[order.value];
  found.sort((one, other) => rank(one) - rank(other) || one.number - other.number);
  place.replaceChildren();
  drawn = 0;
  draw();
}

search.addEventListener("input", begin);
order.addEventListener("change", begin);
more.addEventListener("click", draw);
search.value = decodeURIComponent(location.hash.slice(1));
begin();
