// The page: its views, the served model, the API key and the theme.

import { request, setKey } from "./api.js";
import { offerLogprobs, setModel, startChat } from "./chat.js";
import { setCompareModel, startCompare } from "./compare.js";
import { by, setText, tabs } from "./dom.js";
import { showFleet, startFleet } from "./fleet.js";

const THEMES = ["system", "light", "dark"];
const VIEWS = ["chat", "compare", "fleet"];

function showView(name) {
  for (const view of VIEWS) by(`view-${view}`).hidden = view !== name;
  showFleet(name === "fleet");
  if (location.hash !== `#${name}`) history.replaceState(null, "", name === "chat" ? location.pathname : `#${name}`);
}

async function findModel() {
  const place = by("problem");
  try {
    const models = await (await request("/v1/models")).json();
    const name = models.data[0].id;
    setText(by("model"), name);
    setModel(name);
    setCompareModel(name);
    place.hidden = true;
    findOptions();
    return true;
  } catch (error) {
    if (error.status === 401) {
      by("key-button").hidden = false;
      askKey(error);
    } else {
      setText(place, error.text || `The page failed: ${error.message}`);
      place.hidden = false;
      setTimeout(findModel, 3000);
    }
    return false;
  }
}

/** Offer what only some versions of the API have, as far as it describes itself. */
async function findOptions() {
  try {
    const described = await (await request("/openapi.json")).text();
    if (described.includes('"top_logprobs"')) offerLogprobs();
  } catch {
    // Without a description, the page keeps to what every version has.
  }
}

let tried = false;

function askKey(error) {
  setText(by("key-problem"), tried && error ? error.message : "");
  if (!by("key-dialog").open) by("key-dialog").showModal();
  by("key").focus();
}

function startKey() {
  by("key-button").addEventListener("click", () => askKey(null));
  by("key-cancel").addEventListener("click", () => by("key-dialog").close());
  by("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    tried = true;
    setKey(by("key").value);
    by("key").value = "";
    if (await findModel()) {
      by("key-dialog").close();
      by("message").focus();
    }
  });
}

function startTheme() {
  let at = 0;
  by("theme").addEventListener("click", () => {
    at = (at + 1) % THEMES.length;
    document.documentElement.dataset.theme = THEMES[at];
    setText(by("theme"), `Theme: ${THEMES[at]}`);
    dispatchEvent(new Event("themechange"));
  });
}

startKey();
startTheme();
startChat();
startCompare();
startFleet();
const select = tabs(document.querySelector(".top [role=tablist]"), (tab) => showView(tab.id.slice(4)));
const follow = () => select(by(`tab-${VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat"}`));
addEventListener("hashchange", follow);
follow();
findModel();
