"""The tables of the synthetic classification in English; what is made of them is in tickets.py."""

from __future__ import annotations

CATEGORIES: tuple[str, ...] = ("refund", "delivery", "technical", "billing", "account", "cancellation")

INSTRUCTION = (
    f"Which category does this customer request belong to: {', '.join(CATEGORIES)}? Answer with one word from the list."
)

# For each category: what is wrong, and what the customer asks for. Any pair of the two makes sense.
REQUESTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "refund": (
        (
            "The {product} came with a crack down one side, so I have already sent it back to you.",
            "I returned the {product} two weeks ago and have not seen my {amount} again.",
            "The {product} is not what your shop describes, and I want my money rather than a new one.",
            "You confirmed that the {product} I returned is in your warehouse, but the {amount} has not come back to me.",
            "The {product} broke on the first day, and I do not want to keep it.",
            "I sent back the {product} unused within fourteen days, as your terms allow.",
            "The {product} is far too loud for me, so I have packed it up again to return it.",
        ),
        (
            "Please pay the {amount} back to me.",
            "When will I get my money back?",
            "How do I get the {amount} returned to me?",
            "I would like to have the full price repaid.",
            "Could you reimburse me for it?",
            "Please tell me how long it takes until the money is back with me.",
        ),
    ),
    "delivery": (
        (
            "The {product} should have arrived {days} days ago, and nothing has come.",
            "The tracking page has said 'in transit' for {days} days.",
            "The courier left a note, but the parcel is not at the pick-up point.",
            "It seems that my parcel was left at the wrong house.",
            "Your driver says that the package was handed over, but I was at home and nobody rang.",
            "My parcel has been stuck at the depot since {weekday}.",
            "Only one of the two boxes has reached me; the one with the {product} is still on its way.",
        ),
        (
            "Where is my parcel now?",
            "When will it arrive?",
            "Could you ask the courier what happened?",
            "Please tell me on which day it will be brought to my door.",
            "Can you send me a tracking link that works?",
            "Please find out where the package is.",
        ),
    ),
    "technical": (
        (
            "Since the last update the {product} freezes after a minute or two.",
            "The {product} no longer connects to the Wi-Fi and only shows error {code}.",
            "The app for the {product} crashes every time I open it.",
            "The light on the {product} blinks red, and nothing happens when I press the button.",
            "Pairing the {product} with my phone fails with error {code}.",
            "The {product} restarts by itself every few minutes.",
            "The {product} forgets all of its settings whenever I unplug it.",
        ),
        (
            "How can I fix this?",
            "Which settings should I try?",
            "Is there newer software that solves this?",
            "What steps do you suggest to get it working?",
            "Can somebody walk me through a reset?",
            "Do you know what this error means?",
        ),
    ),
    "billing": (
        (
            "My card was charged twice for the {product}.",
            "The invoice says {amount}, but the price on your page was lower.",
            "There is a charge of {amount} on my bank statement that I cannot explain.",
            "The invoice for the {product} has the wrong company name and no tax number.",
            "Your checkout took my discount code, but I was charged the full {amount}.",
            "This month you charged me {amount}, which is more than we agreed.",
            "I have received a payment reminder for {amount}, although I paid the invoice on {date}.",
        ),
        (
            "Please check the charge.",
            "Please send me a corrected invoice.",
            "Can you explain the amount?",
            "Could your finance team look into this payment?",
            "Why does the invoice not match?",
            "Please go through the figures once more.",
        ),
    ),
    "account": (
        (
            "I cannot log in any more, because the mail to reset my password never comes.",
            "My login is locked after three wrong passwords.",
            "I have a new phone, and the login code still goes to the old one.",
            "I would like to change the e-mail address with which I log in.",
            "My user profile still shows my old surname, and the page does not let me edit it.",
            "Somebody seems to have logged in with my password from another country.",
            "I registered twice by mistake and now have two user profiles.",
        ),
        (
            "Please help me to log in again.",
            "What do I have to do on the login page?",
            "Can you put my user profile right?",
            "Which details do you need to make sure that it is me?",
            "Please look at the login data that you hold for me.",
            "How do I set a new password now?",
        ),
    ),
    "cancellation": (
        (
            "I no longer need the {product}, and you have not sent it out yet.",
            "I want to end my monthly plan before it renews.",
            "Please stop my order for the {product} before it leaves the warehouse.",
            "I have found a better offer and do not want to go on with my order for the {product}.",
            "My plan for the {product} is to end this month, and I do not want another term.",
            "I would like to withdraw from the contract that I signed on {date}.",
            "We are moving abroad, so we no longer want the subscription.",
        ),
        (
            "Please call the whole thing off.",
            "Please confirm in writing that it has been stopped.",
            "Please make sure that it does not go ahead.",
            "Can you still take it out of your system?",
            "Please end it as soon as you can.",
            "What do I have to do to stop it in time?",
        ),
    ),
}

LAYOUTS = (
    "{greeting}\n\n{intro} {problem} {ask} {reference}\n\n{closing}\n{name}",
    "{greeting}\n\n{problem} {ask} {intro} {reference}\n\n{closing}\n{name}",
    "{greeting}\n\nmy name is {name}. {intro} {problem} {ask}\n{reference}\n\n{closing}\n{first_name}",
    "{greeting}\n\n{reference} {problem} {ask}\n\n{closing}\n{name}",
    "{greeting} {intro} {reference} {problem} {ask} {closing} {name}",
)
GREETINGS = (
    "Hello,",
    "Hi there,",
    "Good morning,",
    "Good afternoon,",
    "Dear support team,",
    "Dear Sir or Madam,",
    "Hi,",
)
INTROS = (
    "I ordered a {product} from you on {date}.",
    "On {date} I placed an order for a {product}.",
    "I am writing to you about the {product} from {date}.",
    "My message is about a {product}, ordered on {date}.",
    "I have been a customer of yours for years, most recently with a {product}.",
)
REFERENCES = (
    "My order number is {order} and my e-mail is {email}.",
    "For your reference: order {order}, e-mail {email}.",
    "You can find me as {email}, latest order {order}.",
    "My latest order is {order}; please write to {email}.",
    "Please reply to {email} and quote {order}.",
    "Order {order}, customer {email}.",
)
CLOSINGS = (
    "Kind regards,",
    "Best wishes,",
    "Thank you,",
    "Many thanks,",
    "Yours sincerely,",
    "Thanks in advance,",
    "Best,",
)
PRODUCTS = (
    "tablet", "smart watch", "coffee machine", "robot vacuum", "video doorbell", "fitness tracker", "Bluetooth speaker",
    "wireless keyboard", "projector", "baby monitor", "smart lamp", "printer", "webcam", "gaming console", "dash cam",
    "heating controller", "radio alarm", "bread maker", "security camera", "handheld scanner",
)  # fmt: skip
FIRST_NAMES = (
    "Nadia", "Tom", "Aisha", "Lukas", "Mei", "Carlos", "Ingrid", "Samuel", "Priya", "Oliver", "Fatima", "Jonas", "Elena",
    "David", "Yuki", "Grace", "Pavel", "Chloe", "Kwame", "Marta", "Henrik", "Leila", "Victor", "Rosa", "Daniel", "Amara",
)  # fmt: skip
LAST_NAMES = (
    "Romero", "Baker", "Khan", "Weber", "Lin", "Silva", "Larsen", "Okafor", "Sharma", "Hughes", "Haddad", "Novak", "Rossi",
    "Cohen", "Tanaka", "Murphy", "Ivanov", "Moreau", "Mensah", "Kowalski", "Berg", "Nasser", "Petrov", "Ortiz", "Clark",
)  # fmt: skip
DOMAINS = ("example.com", "example.org", "example.net", "mail.example", "post.example")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
