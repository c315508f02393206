"use strict";
const rows = JSON.parse(document.getElementById("data").textContent);
const search = document.getElementById("search"), order = document.getElementById("order");
const place = document.getElementById("rows"), more = document.getElementById("more"), count = document.getElementById("count");
const KINDS = { t: "trained", m: "masked", b: "boundary", B: "boundary trained", c: "cut", u: "unknown", p: "padding", d: "document", x: "weight" };
const RANKS = {
  worst: (row) => -row.badness, cut: (row) => -row.cut, share: (row) => row.share, length: (row) => -row.length,
  unknown: (row) => -row.unknown, padding: (row) => -row.padding, number: (row) => row.number,
};
const PAGE = 50, SPANS = 50000;
let found = [], drawn = 0;
for (const row of rows) row.text = (row.where + "\n" + row.tokens.map((token) => token[1]).join("")).toLowerCase();

const many = (number) => number.toLocaleString("en");

function card(row) {
  const article = document.createElement("article"), header = document.createElement("header"), body = document.createElement("pre");
  header.textContent = `${row.where} · ${many(row.length)} tokens, ${many(row.trained)} trained (${(100 * row.share).toFixed(1)} %)` +
    (row.cut ? `, ${many(row.cut)} beyond max_length` : "") + (row.unknown ? `, ${many(row.unknown)} unknown` : "") +
    (row.documents > 1 ? `, ${row.documents} documents` : "") + (row.padding ? `, ${many(row.padding)} of padding` : "");
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
  const last = Math.min(found.length, drawn + PAGE);
  let spans = 0;
  while (drawn < last && spans < SPANS) {
    spans += found[drawn].tokens.length;
    place.append(card(found[drawn]));
    drawn += 1;
  }
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
